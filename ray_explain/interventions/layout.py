"""Where a Hugging Face causal language model keeps its blocks, and what they are called."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ray_explain.errors import BadInput

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
SITES: tuple[Site, ...] = get_args(Site)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")
"""Those whose blocks are known in every part; any other family works through hooks."""

DECODERS = ("model.language_model", "language_model.model", "model.decoder", "model", "transformer", "gpt_neox")
BLOCKS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
PARTS: tuple[dict[Site, str], ...] = (
    {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},  # Gemma 2 and 3
    {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},  # GLM-4
    {"attn_out": "self_attention.dense", "mlp_out": "mlp.dense_4h_to_h"},  # Bloom
    {"attn_out": "attn", "mlp_out": "ffn.down_proj"},  # MPT
)
"""Where attention and MLP themselves do not give what is added: norms behind them do, or layers within them. Of each a
block has both or neither."""


class LayoutError(BadInput):
    """The model is not built like a decoder we know; the message names what was looked for."""


@dataclass(frozen=True)
class Layout:
    """The parts of one causal language model.

    `softcap` bounds the logits (Gemma 2): logits = softcap * tanh(logits / softcap). `d_vocab` counts the rows of the
    unembedding, which may be padded beyond the tokenizer's vocabulary.
    """

    model: Any  # of transformers' classes only attributes are used
    decoder: Any
    config: Any  # the text model's, where there are several
    blocks: nn.ModuleList
    embedding: nn.Embedding
    final_norm: nn.Module
    unembedding: nn.Linear
    softcap: float | None
    d_model: int
    n_layers: int
    d_vocab: int
    max_positions: int | None
    family: str

    def module(self, layer: int, site: Site) -> nn.Module:
        """The module whose input (`resid_pre`) or output (the others) is the site.

        `attn_out` and `mlp_out` are what attention and MLP add to the residual stream: their own output, or that of
        one of `PARTS`. `hooks.at_site` checks it where the family is none of `FAMILIES`.

        Raises:
            LayoutError: the block has no such submodule.
        """
        block: Any = self.blocks[layer]
        if site in ("resid_pre", "resid_post"):
            return block
        for names in PARTS:
            if all(_at(block, name) is not None for name in names.values()):
                return _at(block, names[site])  # type: ignore[no-any-return]
        return _submodule(block, ATTENTIONS if site == "attn_out" else MLPS, f"{site} of {type(block).__name__}")

    def mlp(self, layer: int) -> nn.Module:
        """The MLP itself, whatever norm may follow it.

        Raises:
            LayoutError: the block has none.
        """
        return _submodule(self.blocks[layer], MLPS, f"MLP of {type(self.blocks[layer]).__name__}")

    @property
    def device(self) -> torch.device:
        """Where prompts have to be."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return next(self.blocks[0].parameters()).dtype

    def checked_layer(self, layer: int) -> int:
        """`layer`.

        Raises:
            ValueError: it is not one of the model's layers.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} of a {self.family} model: it has {self.n_layers}, numbered from 0")
        return layer


def layout_of(model: nn.Module) -> Layout:
    """The parts of `model`, which may be wrapped by PEFT or DeepSpeed.

    Raises:
        LayoutError: a part was not found, or the model puts prompt-learned vectors before every prompt.
    """
    inner = unwrapped(model)
    decoder, blocks = _decoder_and_blocks(inner)
    config = inner.config.get_text_config()
    embedding, unembedding = inner.get_input_embeddings(), inner.get_output_embeddings()
    if unembedding is None:
        raise LayoutError(f"{type(inner).__name__} has no output embeddings: load it with AutoModelForCausalLM")
    return Layout(
        model=inner,
        decoder=decoder,
        config=config,
        blocks=blocks,
        embedding=embedding,
        final_norm=_submodule(decoder, FINAL_NORMS, f"final norm of {type(decoder).__name__}"),
        unembedding=unembedding,
        softcap=getattr(config, "final_logit_softcapping", None),
        d_model=config.hidden_size,
        n_layers=len(blocks),
        d_vocab=unembedding.weight.shape[0],
        max_positions=getattr(config, "max_position_embeddings", None),
        family=config.model_type,
    )


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's and DeepSpeed's wrappers; LoRA weights stay in it and count.

    Raises:
        LayoutError: a PEFT prompt-learning adapter (prefix or prompt tuning): its vectors live outside the model.
    """
    while True:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise LayoutError(
                f"{type(model).__name__} is a prompt-learning adapter: only adapters of weights can be used"
            )
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):  # DeepSpeedEngine, DistributedDataParallel
            model = model.module
        else:
            return model


def last_logits(layout: Layout, residual: Tensor) -> Tensor:
    """Float32 logits [..., d_vocab] from the residual stream [..., d_model] after the last block: those of the model's
    own forward pass, which also bounds them in its dtype, so that the same ones are tied."""
    logits = layout.unembedding(layout.final_norm(residual))
    if layout.softcap is not None:
        logits = torch.tanh(logits / layout.softcap) * layout.softcap
    return logits.float()


def _decoder_and_blocks(model: Any) -> tuple[Any, nn.ModuleList]:
    for path in DECODERS:
        decoder = _at(model, path)
        for name in BLOCKS:
            blocks = getattr(decoder, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                return decoder, blocks
    looked_for = ", ".join(f"{decoder}.{{{','.join(BLOCKS)}}}" for decoder in DECODERS)
    children = ", ".join(name for name, _ in model.named_children())
    raise LayoutError(f"{type(model).__name__} has no list of blocks at {looked_for}; its children: {children}")


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _submodule(module: nn.Module, names: Iterable[str], what: str) -> nn.Module:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    children = ", ".join(name for name, _ in module.named_children())
    raise LayoutError(f"no {what}: looked for {', '.join(names)}; its children: {children}")
