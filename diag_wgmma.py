"""Where wgmma's results differ, if they do: one expert, identity weights, then random ones, each projection alone."""

import torch

from sere_compile.ops.expert_mlp import nvrtc, stream
from sere_compile.ops.expert_mlp.reference import Call, round_to_fp8
from sere_compile.ops.expert_mlp.stream import StreamConfig


def run(call, activation, config):
    """(act, rows) of the two projections."""
    one = stream.stream_of(call, activation, False, config)
    kernels = stream.functions(one, call.hidden.device.index)
    assert kernels is not None, "does not compile or load"
    slots = call.topk_ids.numel()
    act = torch.full((slots, one.inner), torch.nan, dtype=torch.bfloat16, device="cuda")
    rows = torch.full((slots, one.hidden), torch.nan, device="cuda")
    grid = (torch.cuda.get_device_properties(0).multi_processor_count, 1)
    x8, a8 = stream.room_for_rounded(one, call.hidden), stream.room_for_rounded(one, act)
    first = (call.hidden, call.gate_up, call.gate_up_scale, None, call.topk_ids, act, *x8, slots)
    second = (act, call.down, call.down_scale, None, call.topk_ids, rows, *a8, slots)
    nvrtc.launch(kernels[0], grid, one.threads, one.shared_bytes, first, early=False)
    torch.cuda.synchronize()
    nvrtc.launch(kernels[1], grid, one.threads, one.shared_bytes, second, early=False)
    torch.cuda.synchronize()
    return act, rows


def report(name, got, want):
    """By 8 columns and slot, which are wrong."""
    bad = ~((got.float() - want.float()).abs() <= 0.02 * want.float().abs() + 0.01 * want.float().abs().max())
    error = float((got.double() - want.double()).norm() / want.double().norm())
    print(f"{name}: error {error:.1e}, wrong {int(bad.sum())} of {bad.numel()}")
    if bad.any():
        print("  rows: slots; columns: 8 of the projection's; # wrong, . right")
        for slot, line in enumerate(bad.unflatten(1, (-1, 8)).any(2).tolist()[:32]):
            print("  ", slot, "".join("#" if b else "." for b in line[:160]))
        for slot, column in bad.nonzero()[:12].tolist():
            value = got[slot, column].item()
            at = [tuple(i) for i in (want == value).nonzero()[:4].tolist()]
            wanted = want[slot, column].item()
            print(f"   [{slot}, {column}] = {value}, expected {wanted}; that value is expected at {at}")


def identity_case(config, tokens, fp8_activations):
    """Both projections copy: columns 8 apart and slots 2 apart differ, all exact."""
    eye = torch.eye(128, device="cuda").to(torch.float8_e4m3fn)[None].contiguous()
    scale = torch.ones(1, 1, 1, device="cuda")
    columns = torch.arange(128, device="cuda")
    of_slots = 1 + torch.arange(tokens, device="cuda") % 2
    x = ((columns % 8 + 8) * 2.0 ** (columns // 8 % 6 - 3))[None] * of_slots[:, None]
    x[:, 127] = 448
    ids = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda")
    weights = torch.ones(tokens, 1, device="cuda", dtype=torch.bfloat16)
    call = Call(x.bfloat16().contiguous(), ids, weights, eye, eye, None, None, scale, scale, fp8_activations)
    act, rows = run(call, "relu", config)
    report("  identity, first", act, x)
    report("  identity, second", rows, act.float())


def random_case(config, tokens, fp8_activations, experts=5, hidden=2048, inner=768):
    """Qwen3's sizes; the second projection against what the first one gave."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    gate_up, down = (draw(experts, *s).to(torch.float8_e4m3fn) for s in ((2 * inner, hidden), (hidden, inner)))
    s1, s2 = (
        torch.rand(experts, r // 128, c // 128, device="cuda", generator=generator) * 0.02 + 0.01
        for r, c in ((2 * inner, hidden), (hidden, inner))
    )
    x = draw(tokens, hidden).bfloat16()
    ids = torch.randint(0, experts, (tokens, 1), device="cuda", generator=generator)
    weights = torch.ones(tokens, 1, device="cuda", dtype=torch.bfloat16)
    act, rows = run(Call(x, ids, weights, gate_up, down, None, None, s1, s2, fp8_activations), "silu_glu", config)
    wide = [w.float() * s.repeat_interleave(128, 1).repeat_interleave(128, 2) for w, s in ((gate_up, s1), (down, s2))]

    def product(weight, v):
        v = (round_to_fp8(v) if fp8_activations else v).double()
        return torch.stack([weight[e].double() @ v[t] for t, e in enumerate(ids[:, 0].tolist())])

    y = product(wide[0], x)
    gate, up = y.chunk(2, 1)
    report("  random, first", act, torch.nn.functional.silu(gate) * up)
    report("  random, second, of the first's own result", rows, product(wide[1], act))


if __name__ == "__main__":
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    for fp8_activations in (True, False):
        for config in (
            StreamConfig(16),
            StreamConfig(8, wgmma=True, row_warps=4),
            StreamConfig(16, wgmma=True, row_warps=4),
            StreamConfig(32, wgmma=True, row_warps=4),
        ):
            print("activations rounded" if fp8_activations else "16-bit activations", config)
            identity_case(config, min(config.rows, 13), fp8_activations)
            random_case(config, 40, fp8_activations)
