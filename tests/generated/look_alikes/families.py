"""What a look-alike does with `ids` and `weights` [T, K], or with a selection of its own."""

from __future__ import annotations

from ..forms.text import Part, part

_TABLE = "self.table = nn.Parameter(torch.randn(E, H))"
_EMBEDDING = "self.table = nn.Embedding(E, H)"

# They follow a router, a scoring, a selection and a normalising, and make `result`.
FAMILIES: dict[str, Part] = {
    "best labels": part("result = weights, ids"),
    "best labels with logits": part("result = logits, ids"),
    "labels in order": part("result = ids.sort(-1)[0], weights.sum(-1)"),
    "accuracy of the best": part("result = (ids == (torch.arange(T) % E).unsqueeze(-1)).any(-1).float().mean()"),
    "histogram of labels": part("result = torch.bincount(ids.reshape(-1), minlength=E), weights"),
    "mask of labels": part("result = weights.new_zeros(ids.shape[0], E).scatter(1, ids, 1.0), logits"),
    "filtered probabilities": part(
        'kept = torch.full_like(logits, float("-inf")).scatter(1, ids, logits.gather(1, ids))\n'
        "result = kept.softmax(-1)"
    ),
    "label embeddings": part("result = (self.table(ids) * weights.unsqueeze(-1)).sum(1)", _EMBEDDING),
    "fetched values": part("result = torch.einsum('tk,tkh->th', weights, self.table[ids])", _TABLE),
    "fetched values, residual": part("result = x + (self.table[ids] * weights.unsqueeze(-1)).sum(1)", _TABLE),
    "fetched values, projected": part(
        "result = self.out((self.table[ids] * weights.unsqueeze(-1)).sum(1)) * x",
        f"{_TABLE}\nself.out = nn.Linear(H, H)",
    ),
    "gated memory": part(
        "read = (self.table[ids] * weights.unsqueeze(-1)).sum(1)\nresult = x * torch.sigmoid(read)", _TABLE
    ),
    "values by a dense table": part(
        "result = weights.new_zeros(ids.shape[0], E).scatter(1, ids, weights) @ self.table", _TABLE
    ),
    "values one label at a time": part(
        "result = 0.0\nfor e in range(E):\n"
        "    result = result + (weights * (ids == e)).sum(-1, keepdim=True) * self.table[e]",
        _TABLE,
    ),
    "prompt pool": part(
        "prompts = self.pool[ids] * weights.unsqueeze(-1).unsqueeze(-1)\n"
        "result = torch.cat([prompts.flatten(1, 2), x.unsqueeze(1)], 1).mean(1)",
        "self.pool = nn.Parameter(torch.randn(E, 2, H))",
    ),
    "prompt pool, attended": part(
        "prompts = self.pool[ids].flatten(1, 2)\n"
        "near = (self.query(x).unsqueeze(1) * prompts).sum(-1).softmax(-1)\n"
        "result = (near.unsqueeze(-1) * prompts).sum(1), weights",
        "self.pool = nn.Parameter(torch.randn(E, 2, H))\nself.query = nn.Linear(H, H)",
    ),
    "soft codebook": part(
        "code = (self.table[ids] * weights.unsqueeze(-1)).sum(1)\nresult = x + (code - x).detach(), ids", _TABLE
    ),
    "sparse autoencoder": part(
        "code = weights.new_zeros(ids.shape[0], E).scatter(1, ids, torch.relu(weights))\n"
        "result = F.linear(code, self.decoder)",
        "self.decoder = nn.Parameter(torch.randn(H, E))",
    ),
    "next token": part(
        "token = ids.gather(1, weights.argmax(-1, keepdim=True)).squeeze(-1)\nresult = self.table(token)", _EMBEDDING
    ),
    "draft tokens": part("result = torch.cat([self.table(ids), x.unsqueeze(1)], 1)", _EMBEDDING),
    "temperature of a label": part(
        "result = logits / self.scale[ids[:, :1]]", "self.scale = nn.Parameter(torch.rand(E) + 0.5)"
    ),
    "cost of labels": part("result = (weights * self.cost[ids]).sum(-1)", "self.cost = nn.Parameter(torch.rand(E))"),
    "label smoothing loss": part(
        "target = torch.zeros_like(logits).scatter(1, ids, weights.to(logits.dtype))\n"
        "result = -(target * logits.log_softmax(-1)).sum(-1).mean()"
    ),
}

# They select for themselves: over tokens, distances, keys or pairs.
OWN_SELECTION: dict[str, Part] = {
    "nearest neighbours": part(
        "near, ids = torch.cdist(x, self.bank).topk(K, largest=False)\n"
        "votes = F.one_hot(self.labels[ids], 3) * (-near).softmax(-1).unsqueeze(-1)\nresult = votes.sum(1)",
        'self.bank = nn.Parameter(torch.randn(E, H))\nself.register_buffer("labels", torch.arange(E) % 3)',
    ),
    "nearest codes": part(
        "near, ids = (-torch.cdist(x, self.codes)).topk(K)\n"
        "result = (self.codes[ids] * near.softmax(-1).unsqueeze(-1)).sum(1)",
        "self.codes = nn.Parameter(torch.randn(E, H))",
    ),
    "nearest code": part(
        "ids = (F.linear(x, self.codes) * 2 - self.codes.pow(2).sum(-1)).argmax(-1)\n"
        "result = self.codes[ids], (x - self.codes[ids]).pow(2).mean()",
        "self.codes = nn.Parameter(torch.randn(E, H))",
    ),
    "tied codes": part(
        "near, ids = F.linear(x, self.codes).topk(K)\n"
        "result = (self.codes[ids] * near.softmax(-1).unsqueeze(-1)).sum(1)",
        "self.codes = nn.Parameter(torch.randn(E, H))",
    ),
    "cosine memory": part(
        "near, ids = F.linear(F.normalize(x, dim=-1), F.normalize(self.keys, dim=-1)).topk(K)\n"
        "result = x + (self.values[ids] * near.softmax(-1).unsqueeze(-1)).sum(1)",
        "self.keys = nn.Parameter(torch.randn(E, H))\nself.values = nn.Parameter(torch.randn(E, H))",
    ),
    "product keys": part(
        "left, i = F.linear(x, self.left).topk(K)\nright, j = F.linear(x, self.right).topk(K)\n"
        "sums = (left.unsqueeze(2) + right.unsqueeze(1)).flatten(1)\n"
        "pairs = (i.unsqueeze(2) * E + j.unsqueeze(1)).flatten(1)\nnear, at = sums.topk(K)\n"
        "result = (self.values(pairs.gather(1, at)) * near.softmax(-1).unsqueeze(-1)).sum(1)",
        "self.left = nn.Parameter(torch.randn(E, H))\nself.right = nn.Parameter(torch.randn(E, H))\n"
        "self.values = nn.Embedding(E * E, H)",
    ),
    "pruned tokens": part(
        "keep = self.score(x).squeeze(-1).topk(K).indices\nresult = self.out(x[keep])",
        "self.score = nn.Linear(H, 1)\nself.out = nn.Linear(H, H)",
    ),
    "mixture of depths": part(
        "share, keep = self.score(x).squeeze(-1).topk(K)\n"
        "done = self.down(F.silu(self.up(x[keep]))) * torch.sigmoid(share).unsqueeze(-1)\n"
        "result = x.index_add(0, keep, done)",
        "self.score = nn.Linear(H, 1)\nself.up = nn.Linear(H, I)\nself.down = nn.Linear(I, H)",
    ),
    "experts choose tokens": part(
        "share, keep = F.linear(x, self.router).softmax(-1).topk(K, dim=0)\n"
        "done = torch.tanh(torch.einsum('keh,ehj->kej', x[keep], self.stack)) * share.unsqueeze(-1)\n"
        "result = torch.zeros_like(x).index_add(0, keep.reshape(-1), done.reshape(-1, H))",
        "self.router = nn.Parameter(torch.randn(E, H))\nself.stack = nn.Parameter(torch.randn(E, H, H) / H)",
    ),
    "sparse attention": part(
        "near = self.query(x) @ self.key(x).T\nids = near.topk(K).indices\n"
        'mask = torch.full_like(near, float("-inf")).scatter(-1, ids, 0.0)\n'
        "result = (near + mask).softmax(-1) @ self.value(x)",
        "self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)",
    ),
    "attention to fetched tokens": part(
        "near, ids = (self.query(x) @ self.key(x).T).topk(K)\n"
        "result = (self.value(x)[ids] * near.softmax(-1).unsqueeze(-1)).sum(1)",
        "self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)",
    ),
    "boxes and classes": part(
        "near, ids = self.score(x).sigmoid().flatten().topk(K)\nresult = x[ids // E] * near.unsqueeze(-1), ids % E",
        "self.score = nn.Linear(H, E)",
    ),
    "beams": part(
        "near, ids = (self.score(x).log_softmax(-1) + x.sum(-1, keepdim=True)).flatten().topk(K)\n"
        "result = near, x[ids // E], ids % E",
        "self.score = nn.Linear(H, E)",
    ),
    "adapter of the best label": part(
        "best = self.score(x).argmax(-1)\nresult = x + torch.bmm(x.unsqueeze(1), self.adapters[best]).squeeze(1), best",
        "self.score = nn.Linear(H, E)\nself.adapters = nn.Parameter(torch.randn(E, H, H) / H)",
    ),
    "best channels": part("near, ids = x.mean(0).topk(K)\nresult = x[:, ids] * near", ""),
    "every head weighted": part(
        "share = self.score(x).softmax(-1)\nheads = torch.tanh(torch.einsum('th,ehj->tej', x, self.heads))\n"
        "result = (heads * share.unsqueeze(-1)).sum(1), share.topk(K).indices",
        "self.score = nn.Linear(H, E)\nself.heads = nn.Parameter(torch.randn(E, H, H) / H)",
    ),
}
