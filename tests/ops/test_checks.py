"""`checks`: each argument that operators share is refused with its name, what was expected and what came."""

import pytest
import torch

from sere_compile.ops import checks

IDS, SIMILARITY = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(8, 8)
AWAY = torch.zeros(4, 2, device="meta")


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.check_ids(IDS.float()), TypeError, r"topk_ids: .*int32 or torch\.int64, got torch\.float32"),
        (lambda: checks.check_ids(IDS[0, 0]), ValueError, r"topk_ids: expected shape \[\.\.\., K\]"),
        (lambda: checks.check_weights(IDS, IDS), TypeError, r"topk_weights: .* got torch\.int64"),
        (lambda: checks.check_weights(IDS, torch.zeros(4, 3)), ValueError, r"shape \[4, 2\] .* got \[4, 3\]"),
        (lambda: checks.check_weights(IDS, AWAY), ValueError, r"topk_weights: expected device cpu \(of topk_ids\)"),
        (lambda: checks.check_token_mask(IDS, torch.zeros(4)), TypeError, r"token_mask: .* got torch\.float32"),
        (lambda: checks.check_token_mask(IDS, torch.zeros(2) > 0), ValueError, r"shape \[4\] .* got \[2\]"),
        (lambda: checks.check_similarity(IDS, 0), TypeError, r"similarity: .* got torch\.int64"),
        (lambda: checks.check_similarity(SIMILARITY[:3], 0), ValueError, r"shape \[E, E\] .* got \[3, 8\]"),
        (lambda: checks.check_similarity(SIMILARITY[:0, :0], 0), ValueError, r"E >= 1, got \[0, 0\]"),
        (lambda: checks.check_similarity(SIMILARITY, -1), ValueError, "min_active: .* got -1"),
        (lambda: checks.check_budget(-2), ValueError, "max_active: .* got -2"),
        (
            lambda: checks.check_same_device(IDS, "ids", first=None, second=IDS, third=AWAY, fourth=AWAY),
            ValueError,
            r"third: expected device cpu \(of ids\), got meta",
        ),
    ],
)
def test_refused(check, error, message):
    """TypeError for a dtype, ValueError for anything else."""
    with pytest.raises(error, match=message):
        check()


def test_accepted():
    """What fits raises nothing; masks, weights and others may be left out."""
    checks.check_ids(IDS.int())
    checks.check_weights(IDS, torch.zeros(4, 2, dtype=torch.bfloat16))
    checks.check_token_mask(IDS, torch.ones(4, dtype=torch.bool))
    checks.check_token_mask(IDS, None)
    checks.check_similarity(SIMILARITY.half(), 3)
    checks.check_budget(0)
    checks.check_same_device(IDS, "ids", weights=None, mask=IDS)
