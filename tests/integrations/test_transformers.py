"""What differs between versions of transformers."""

from sere_compile.integrations.transformers import cache_argument

from ..tiny_models import mixtral


class Older:
    def forward(self, input_ids=None, past_key_values=None): ...


class Newer:
    def forward(self, input_ids=None, cache=None): ...


def test_name_of_the_cache():
    assert cache_argument(Older()) == "past_key_values"
    assert cache_argument(Newer()) == "cache"
    assert cache_argument(mixtral()) in ("cache", "past_key_values")
