"""What looks like an MoE gate and is none: every selection here has as many columns as the model has experts.

Each is the body of a forward over x [T, H], with the parameters of `Lookalike` at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

TOKENS, HIDDEN, EXPERTS, TOP_K = 10, 6, 8, 3

Body = Callable[["Lookalike", torch.Tensor], torch.Tensor]
NEGATIVES: dict[str, Body] = {}


def negative(body: Body) -> Body:
    """Register a body under its function's name."""
    NEGATIVES[body.__name__] = body
    return body


class Lookalike(nn.Module):
    """A body with parameters that an MoE layer of E experts could have too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.body = NEGATIVES[name]
        self.head = make(EXPERTS, HIDDEN)  # a projection to E columns
        self.bias = make(EXPERTS)
        self.table = make(EXPERTS, HIDDEN)  # a vector for each of E things
        self.score = make(1, HIDDEN)
        self.query, self.key = make(HIDDEN, HIDDEN), make(HIDDEN, HIDDEN)
        self.pool = make(EXPERTS, 2, HIDDEN)  # a short sequence for each of E things
        self.stack = make(EXPERTS, HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


# --- decoding ---------------------------------------------------------------------------------------------------------


@negative
def vocabulary_sampling(m, x):
    values, ids = F.linear(x, m.head).topk(TOP_K)
    choice = torch.multinomial(values.softmax(-1), 1)
    return ids.gather(-1, choice)


@negative
def top_k_filter(m, x):
    logits = F.linear(x, m.head)
    return logits.masked_fill(logits < logits.topk(TOP_K).values[..., -1:], float("-inf")).softmax(-1)


@negative
def nucleus_filter(m, x):
    logits, order = F.linear(x, m.head).sort(-1, descending=True)
    removed = logits.softmax(-1).cumsum(-1) > 0.9
    return logits.masked_fill(removed.scatter(1, order, removed), float("-inf")).softmax(-1)


@negative
def beam_search(m, x):
    scores = F.log_softmax(F.linear(x, m.head), -1) + x.sum(-1, keepdim=True)
    best, ids = scores.reshape(2, -1).topk(TOP_K)
    return torch.stack([best, (ids // EXPERTS).float(), (ids % EXPERTS).float()])


@negative
def beam_candidates_with_history(m, x):
    best, ids = F.linear(x, m.head).log_softmax(-1).topk(TOP_K)
    return torch.cat([ids, ids.new_zeros(len(ids), 1)], -1).float() + best.sum()


@negative
def greedy_token_fed_back(m, x):
    token = F.linear(x, m.head).argmax(-1)
    return F.linear(F.embedding(token, m.table), m.query)


@negative
def speculative_draft(m, x):
    scores, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return torch.cat([F.embedding(ids, m.table), scores[..., None].expand(-1, -1, HIDDEN)], 1)


# --- classification ---------------------------------------------------------------------------------------------------


@negative
def class_prediction_with_label_embedding(m, x):
    probabilities, labels = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return (m.table[labels] * probabilities[..., None]).sum(1)


@negative
def accuracy_at_k(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    labels = torch.arange(len(x)) % EXPERTS
    return (ids == labels[:, None]).any(-1).float().mean()


@negative
def early_exit(m, x):
    confidence, label = F.linear(x, m.head).softmax(-1).max(-1)
    return torch.where((confidence > 0.5)[:, None], m.table[label], x)


@negative
def multi_label_statistics(m, x):
    ids = F.linear(x, m.head).sigmoid().topk(TOP_K).indices
    return torch.bincount(ids.flatten(), minlength=EXPERTS).float() / len(x)


# --- detection --------------------------------------------------------------------------------------------------------


@negative
def detr_queries(m, x):
    scores = F.linear(x, m.head).max(-1).values
    ids = scores.topk(TOP_K, dim=0).indices
    return x.gather(0, ids[:, None].expand(-1, HIDDEN)) @ m.query


@negative
def detr_queries_of_as_many_tokens_as_experts(m, x):
    scores = F.linear(x[:EXPERTS], m.score).squeeze(-1)
    ids = scores.topk(TOP_K).indices
    return x[:EXPERTS][ids] @ m.query


@negative
def post_processing_over_queries_and_classes(m, x):
    scores, ids = F.linear(x, m.head).sigmoid().flatten().topk(TOP_K)
    return x[ids // EXPERTS] * scores[:, None]


@negative
def non_maximum_suppression(m, x):
    order = F.linear(x, m.head)[:, 0].sort(descending=True).indices
    return x[order][:TOP_K]


# --- attention --------------------------------------------------------------------------------------------------------


@negative
def sparse_attention_indexer(m, x):
    scores = (x @ m.query) @ (x[:EXPERTS] @ m.key).T  # [T, E keys]
    ids = scores.relu().topk(TOP_K).indices
    mask = torch.full_like(scores, float("-inf")).scatter(-1, ids, 0.0)
    return (scores + mask).softmax(-1) @ x[:EXPERTS]


@negative
def attention_top_k(m, x):
    scores = (x @ m.query) @ (x[:EXPERTS] @ m.key).T
    kept = scores.topk(TOP_K).values[..., -1:]
    return scores.masked_fill(scores < kept, float("-inf")).softmax(-1) @ x[:EXPERTS]


@negative
def attention_over_selected_blocks(m, x):
    blocks = x[:EXPERTS] @ m.key
    ids = F.linear(x, blocks).topk(TOP_K).indices
    keys = blocks[ids]  # [T, K, H]
    return ((keys * x[:, None]).sum(-1).softmax(-1)[..., None] * keys).sum(1)


@negative
def attention_to_learned_slots(m, x):
    scores, ids = F.linear(x, m.head).topk(TOP_K)
    return (scores.softmax(-1)[..., None] * m.table[ids]).sum(1)


@negative
def hashing_buckets(m, x):
    bucket = torch.cat([F.linear(x, m.head), -F.linear(x, m.head)], -1).argmax(-1)
    order = bucket.argsort(stable=True)
    return x[order].cumsum(0)[order.argsort()]


# --- sparse codes and quantisers --------------------------------------------------------------------------------------


@negative
def sae_top_k(m, x):
    values, ids = F.linear(x, m.head, m.bias).relu().topk(TOP_K)
    code = torch.zeros(len(x), EXPERTS).scatter(-1, ids, values)
    return code @ m.table


@negative
def sae_batch_top_k(m, x):
    code = F.linear(x, m.head, m.bias).relu()
    kept = code.flatten().topk(TOP_K * len(x)).values[-1]
    return torch.where(code >= kept, code, 0.0) @ m.table


@negative
def sae_decoder_rows(m, x):
    values, ids = F.linear(x, m.head, m.bias).topk(TOP_K)
    return (values.relu()[..., None] * F.embedding(ids, m.table)).sum(1)


@negative
def vector_quantisation(m, x):
    return F.embedding(torch.cdist(x, m.table).argmin(-1), m.table)


@negative
def vector_quantisation_by_smallest(m, x):
    distance, ids = torch.cdist(x, m.table).topk(TOP_K, largest=False)
    return (distance.neg().softmax(-1)[..., None] * m.table[ids]).sum(1)


@negative
def vector_quantisation_by_product(m, x):
    ids = (F.linear(x, m.table) * 2 - m.table.pow(2).sum(-1)).topk(1).indices
    return m.table[ids.squeeze(-1)]


@negative
def gumbel_quantiser(m, x):
    logits = F.linear(x, m.head)
    hard = F.one_hot((logits + m.bias).argmax(-1), EXPERTS).to(x.dtype)
    soft = logits.softmax(-1)
    return (hard - soft.detach() + soft) @ m.table


@negative
def residual_codebooks(m, x):
    total = torch.zeros_like(x)
    for book in m.pool.unbind(1):
        total = total + book[F.linear(x - total, book).argmax(-1)]
    return total


# --- other ways to be sparse ------------------------------------------------------------------------------------------


@negative
def expert_choice(m, x):
    weights, tokens = F.linear(x, m.head).softmax(-1).T.topk(TOP_K)  # [E, K] tokens of each expert
    y = torch.bmm(x[tokens], m.stack) * weights[..., None]
    return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


@negative
def expert_choice_of_as_many_tokens_as_experts(m, x):
    x = x[:EXPERTS]
    weights, tokens = F.linear(x, m.head).softmax(-1).T.topk(TOP_K)
    y = torch.bmm(x[tokens], m.stack) * weights[..., None]
    return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


@negative
def mixture_of_depths(m, x):
    weights, tokens = F.linear(x[:EXPERTS], m.score).squeeze(-1).topk(TOP_K)
    y = (x[tokens] @ m.query) * weights.sigmoid()[:, None]
    return x.index_add(0, tokens, y)


@negative
def soft_experts(m, x):
    weights = F.linear(x, m.head).softmax(-1)
    return torch.einsum("te,eth->th", weights, torch.bmm(x.expand(EXPERTS, -1, -1), m.stack))


@negative
def kernels_by_attention(m, x):
    weights = F.linear(x.mean(0, keepdim=True), m.head).softmax(-1)
    return x @ (weights[0][:, None, None] * m.stack).sum(0)


@negative
def stack_by_given_number(m, x):
    return (x[:, None] @ m.stack[torch.arange(len(x)) % EXPERTS]).squeeze(1)


@negative
def prompt_pool(m, x):
    scores, ids = F.linear(F.normalize(x, dim=-1), F.normalize(m.head, dim=-1)).topk(TOP_K)
    prompts = m.pool[ids].flatten(1, 2)  # [T, K * 2, H] in front of the sequence
    return torch.cat([prompts, x[:, None]], 1) + (1 - scores).mean()


@negative
def prompt_pool_with_plain_keys(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    return torch.cat([m.pool[ids].flatten(1, 2), x[:, None]], 1)


@negative
def weighted_prompt_pool(m, x):
    scores, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    prompts = (m.pool[ids] * scores[..., None, None]).sum(1)
    return torch.cat([prompts, x[:, None]], 1)


@negative
def product_keys(m, x):
    half = F.linear(x, m.head).view(len(x), 2, EXPERTS // 2)
    values, ids = half.topk(2)
    scores = (values[:, 0, :, None] + values[:, 1, None, :]).flatten(1)
    numbers = (ids[:, 0, :, None] * 2 + ids[:, 1, None, :]).flatten(1) % EXPERTS
    best, place = scores.topk(TOP_K)
    return (F.embedding(numbers.gather(1, place), m.table) * best.softmax(-1)[..., None]).sum(1)


@negative
def memory_layer(m, x):
    scores, ids = F.linear(x @ m.query, m.head).topk(TOP_K)
    return F.embedding_bag(ids, m.table, per_sample_weights=scores.softmax(-1), mode="sum")


@negative
def retrieval(m, x):
    ids = F.linear(F.normalize(x, dim=-1), m.table).topk(TOP_K).indices
    return torch.cat([x[:, None], m.table[ids]], 1)


@negative
def nearest_neighbours(m, x):
    ids = (-torch.cdist(x, m.table)).topk(TOP_K).indices
    return F.one_hot(ids % 2, 2).float().mean(1)


@negative
def hard_negatives(m, x):
    scores = F.linear(x, m.table).fill_diagonal_(float("-inf"))
    ids = scores.topk(TOP_K).indices
    return (x[:, None] - m.table[ids]).pow(2).sum(-1).mean()


# --- tokens and features ----------------------------------------------------------------------------------------------


@negative
def token_merging(m, x):
    even, odd = x[::2], x[1::2]
    score, partner = (even @ odd.T).max(-1)
    moved = score.topk(2).indices
    return odd.index_add(0, partner[moved], even[moved])


@negative
def k_max_pooling(m, x):
    return F.linear(x, m.head).topk(TOP_K).values


@negative
def graph_pooling(m, x):
    scores, nodes = F.linear(x[:EXPERTS], m.score).squeeze(-1).tanh().topk(TOP_K)
    return x[nodes] * scores[:, None]


@negative
def random_masking(m, x):
    noise = F.linear(x, m.head).sum(-1)
    kept = noise.argsort()[:TOP_K]
    return x[kept]


@negative
def feature_selection(m, x):
    ids = m.bias.topk(TOP_K).indices
    return F.linear(x, m.head)[:, ids]


@negative
def magnitude_pruning(m, x):
    kept = m.head.abs().topk(TOP_K).values[..., -1:]
    return F.linear(x, torch.where(m.head.abs() >= kept, m.head, 0.0))


@negative
def gradient_compression(m, x):
    values, ids = F.linear(x, m.head).flatten().abs().topk(TOP_K)
    return torch.zeros(len(x) * EXPERTS).scatter(0, ids, values)


@negative
def median_filter(m, x):
    return F.linear(x, m.head).sort(-1).values[..., EXPERTS // 2]


@negative
def smallest_scores(m, x):
    ids = F.linear(x, m.head).topk(TOP_K, largest=False).indices
    return m.table[ids].sum(1)


# --- beside a gate ----------------------------------------------------------------------------------------------------


@negative
def auxiliary_loss(m, x):
    weights = F.linear(x, m.head).softmax(-1)
    chosen = F.one_hot(weights.topk(TOP_K).indices, EXPERTS).float()
    return (chosen.mean((0, 1)) * weights.mean(0)).sum() * EXPERTS


@negative
def load_statistics(m, x):
    ids = F.linear(x, m.head).softmax(-1).topk(TOP_K).indices
    return torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1)


@negative
def group_scores(m, x):
    scores = F.linear(x, m.head).sigmoid().view(len(x), 2, -1)
    group = scores.topk(2).values.sum(-1).topk(1).indices
    return torch.zeros(len(x), 2).scatter(1, group, 1.0)


# --- what fetches stacked tensors, or names each number, without experts ----------------------------------------------


@negative
def per_class_hits(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    return torch.stack([(ids == c).any(-1).float().mean() for c in range(EXPERTS)])


@negative
def per_class_confidence(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return torch.stack([(values * (ids == c)).sum() for c in range(EXPERTS)])


@negative
def confusion_columns(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    hot = F.one_hot(ids, EXPERTS).float()
    return torch.stack([hot[..., c].mul(values).sum(-1) for c in range(EXPERTS)], -1)


@negative
def late_interaction(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    return torch.einsum("th,tklh->tkl", x, m.pool[ids]).amax(-1)


@negative
def late_interaction_reranked(m, x):
    values, ids = F.linear(x, m.head).topk(TOP_K)
    return torch.einsum("th,tklh->tkl", x, m.pool[ids]).amax(-1) + values


@negative
def prefix_pool_attention(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    keys = m.pool[ids].flatten(1, 2)
    return (torch.einsum("th,tlh->tl", x @ m.query, keys).softmax(-1)[..., None] * keys).sum(1)


@negative
def expert_choice_of_as_many_tokens(m, x):
    x = x[:EXPERTS]
    s = F.linear(x, m.head).softmax(-1).T
    values, ids = s.topk(TOP_K, -1)
    return torch.bmm(x[ids], m.stack) * values[..., None]


@negative
def rank_features(m, x):
    return F.linear(x, m.head).sort(-1, descending=True).values[:, :TOP_K]


@negative
def class_thresholds(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return (values > m.bias[ids]).float()


@negative
def label_smoothing_targets(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return torch.full((len(x), EXPERTS), 0.01).scatter(1, ids, values)


@negative
def distillation_on_top_k(m, x):
    t = F.linear(x @ m.query, m.head)
    values, ids = t.topk(TOP_K)
    return -(values.softmax(-1) * F.linear(x, m.table).log_softmax(-1).gather(1, ids)).sum()


@negative
def class_conditional_scale(m, x):
    ids = F.linear(x, m.head).argmax(-1)
    return x * m.table[ids]


@negative
def embedding_mixture_then_matrix(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    z = (m.table[ids] * values[..., None]).sum(1)
    return torch.einsum("th,ehf->tef", z, m.stack).sum(1)


@negative
def bucketed_sort_of_values(m, x):
    values, ids = F.linear(x, m.head).topk(TOP_K)
    order = ids.flatten().argsort()
    return values.flatten()[order]


@negative
def pruned_softmax(m, x):
    s = F.linear(x, m.head)
    values, ids = s.topk(TOP_K)
    return torch.full_like(s, -math.inf).scatter(1, ids, values).softmax(-1) @ m.table


@negative
def attention_over_chosen_rows(m, x):
    ids = F.linear(x, m.head).topk(TOP_K).indices
    k = x[ids.clamp(max=len(x) - 1)]
    return (torch.einsum("th,tkh->tk", x, k).softmax(-1)[..., None] * k).sum(1)


@negative
def contrastive_hard_negatives(m, x):
    ids = F.linear(x, m.table).topk(TOP_K).indices
    return torch.einsum("th,tkh->tk", x @ m.query, m.table[ids])


@negative
def multi_head_pool(m, x):
    values, ids = F.linear(x, m.head).softmax(-1).topk(TOP_K)
    return torch.cat([x[:, None], (m.pool[ids] * values[..., None, None]).sum(1)], 1)
