"""Which key paths EMBEDDINGS finds, and what is said of patterns that find none."""

import re

import pytest

import rootfree_optax as rf
from rootfree_optax._src.layout.paths import require_match

FOUND = """
    embed_tokens/weight pos_embedding tok_embeddings/weight token_embedder/embedding position_embeddings/weight
    Embed_0/embedding embed2/w embeddings[0] shared/embedding patch_embed/proj/kernel tok_emb/weight unembed/kernel
    UnEmbed unembedding tokenEmbedding posEmbed/x PosEmbed VocabParallelEmbedding/w PositionalEncoding_0/pos EMBED
    wte/embedding transformer.wte.weight wpe vocab/kernel logits_dense/kernel cls_token tokens/w position/table
    lm_head/kernel LMHead/kernel LMHead_0/kernel LM_HEAD mlm-head/w head/kernel head.weight head_1/kernel head[0]/w
    heads_0/head/kernel classifier_head/kernel ClassifierHead/Dense_0/kernel transformer/~/lm_head/w
"""
NOT_FOUND = """
    header_norm/kernel Header/w overhead/kernel ahead/w headroom/kernel HeadNorm/scale head_dim/kernel heads/kernel
    attention_head_proj/kernel multihead_attention/kernel multi_head/kernel MultiHead/kernel
    MultiHeadDotProductAttention_0/query/kernel MultiHeadAttention_0/out/kernel positive/kernel POSITIVE/w post/kernel
    Post/w compose/kernel Composition/kernel position_wise_ffn/kernel tokenizer/kernel token_mixing/Dense_0/kernel
    TokenMixer/kernel embedded/kernel member/kernel remember/w layers_0/mlp/kernel conv_1/kernel
"""


@pytest.mark.parametrize("path", FOUND.split())
def test_embeddings_and_heads_are_found(path: str) -> None:
    assert re.search(rf.EMBEDDINGS, path)


@pytest.mark.parametrize("path", NOT_FOUND.split())
def test_hidden_layers_are_not_taken_for_embeddings(path: str) -> None:
    assert not re.search(rf.EMBEDDINGS, path)


def test_a_pattern_without_a_match_is_an_error_that_names_the_nearest_paths() -> None:
    paths = ["decoder/layers_0/kernel", "decoder/embedding", "unrelated"]
    require_match("pattern", "layers_.*kernel", paths)
    require_match("pattern", "anything", [])
    with pytest.raises(ValueError, match=r"pattern must match.*got 'embeding'. The nearest key paths are 'decoder/emb"):
        require_match("pattern", "embeding", paths)
