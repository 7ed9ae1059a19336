"""What a model looks like to a method: a :class:`Family` of blocks in one :class:`Stack` or several, each
with the :class:`Site` s of its activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from microbat.experts import Experts
from microbat.models.layout import Layout, stored_form
from microbat.registry import instances


@dataclass(frozen=True, kw_only=True)
class Site:
    """One activation inside a block: the module that produces it and the linear layers that consume it, as paths.

    ``producer`` None: nothing whose output's channels, multiplied by factors, multiply the activation's (what comes out of a
    GELU). ``normed``: the producer is a norm of the residual stream. ``headed``: the producer's output, the values, is mixed
    over tokens on its way here, head by head; its lanes are heads times the head's size. ``gated``: the producer's output is
    multiplied by another activation on its way here, and nothing else, so that its rows' factors are the channels'. ``readers``:
    modules with a weight [N, K] that consume it too and stay in float (a router).
    """

    name: str
    producer: str | None
    consumers: tuple[str, ...]
    normed: bool = False
    headed: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """How a model is told whether to think aloud, and where it did: mode -> what is put behind a prompt, and the tokens that
    open and close its thoughts."""

    modes: tuple[tuple[str, str], ...]
    opening: str
    closing: str


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The width between two linear layers of a block, where zeros may be appended: ``makers`` write it, ``reader`` reads it, and
    what happens in between, lane by lane, leaves zeros zero. ``entry`` of the config says how wide it is."""

    makers: tuple[str, ...]
    reader: str
    entry: str = "intermediate_size"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks of one kind, one after the other, and what is inside each.

    ``config``: the part of the model's config that describes them (empty: the config itself). ``taps``: the entry there that
    lists blocks whose outputs others read than the next block. ``rotates``: its residual stream is what a rotation of the model
    rotates. ``caches``: its keys and values are kept from token to token. ``sequences``: its activations are [S, L, K]; those
    of others are tokens [T, K] of several images, packed. ``inner``: its width that is padded to whole blocks of a format.
    ``sites`` of layers that a block does not have are none of that block's (:meth:`sites_in`).
    """

    sites: tuple[Site, ...]
    attention: str = "self_attn"  # the module that mixes tokens, inside a block
    blocks: str = "model.layers"
    rotary: str = "model.rotary_emb"
    config: str = ""
    taps: str = ""
    rotates: bool = True
    caches: bool = True
    sequences: bool = True
    inner: Inner | None = None

    def sites_in(self, block: nn.Module) -> tuple[Site, ...]:
        """The sites that ``block`` has: those whose consumers are there."""
        return tuple(site for site in self.sites if _has(block, site.consumers[0]))


@dataclass(frozen=True, kw_only=True)
class Family(Stack):
    """Where things are in every model whose config says ``model_type == name``: the blocks of its language model, what is around
    them, and the ``towers`` of blocks that run before, in the order of execution.

    ``others``: modules outside all blocks that have weights. ``feeds``: patterns of linear layers among them that write to
    the residual stream. ``auto``: the class of transformers that makes such a model from its config. ``stored``: how names in a
    checkpoint begin, where not as the modules are called, and what that stands for. ``experts``: the module of a block that holds
    its experts, where there are any. ``layouts``: what a checkpoint stores otherwise than the model holds it.

    ``same_as``: the model_type under which transformers computes the same, for models whose own code is on the hub alone, where
    ``renamed`` entries of config.json have other names. No code of the hub is ever run.
    """

    name: str
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")  # linear layers that add to the residual stream
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    towers: tuple[Stack, ...] = ()
    others: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"
    stored: tuple[tuple[str, str], ...] = ()
    experts: str = ""
    layouts: tuple[Layout, ...] = ()
    same_as: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    thinking: Thinking | None = None

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All blocks, in the order of execution."""
        return (*self.towers, self)

    def stored_form(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block by their names in it, as checkpoints of the family store them."""
        return stored_form(block, self.layouts)

    def told(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The ``entries`` of a config.json in the words of :attr:`same_as`."""
        if not self.same_as:
            return entries
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        names = dict(self.renamed)
        kept = {names.get(key, key): value for key, value in entries.items() if key != "auto_map"}
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.same_as]
        return {**kept, "model_type": self.same_as, "architectures": [architecture]}


DECODER_SITES = (
    Site(
        name="qkv",
        producer="input_layernorm",
        consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        normed=True,
    ),
    Site(name="o", producer="self_attn.v_proj", consumers=("self_attn.o_proj",), headed=True),
    Site(name="up", producer="post_attention_layernorm", consumers=("mlp.gate_proj", "mlp.up_proj"), normed=True),
    Site(name="down", producer="mlp.up_proj", consumers=("mlp.down_proj",), gated=True),
)
# Of experts [E, N, K] (microbat.experts): one activation for all of a block's, whose tokens the router then deals out.
EXPERT_SITES = (
    Site(
        name="experts_up",
        producer="post_attention_layernorm",
        consumers=("mlp.experts.gate_proj", "mlp.experts.up_proj"),
        normed=True,
        readers=("mlp.gate",),
    ),
    Site(name="experts_down", producer="mlp.experts.up_proj", consumers=("mlp.experts.down_proj",)),
)
EXPERT_WRITERS = ("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj")


def families() -> dict[str, Family]:
    """Every known family by its ``model_type``."""
    return instances("microbat.models", Family)


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; an unknown one raises with the way to add it."""
    known = families()
    if model_type not in known:
        raise ValueError(
            f"model_type {model_type!r} has no family (known: {', '.join(known)}). To add it, put a file into "
            "microbat/models/ with a Family(name=..., sites=...) that says where its linear layers are; "
            "models/llama.py is the example."
        )
    return known[model_type]


def hold_experts(model: nn.Module, family: Family) -> None:
    """Put :class:`microbat.experts.Experts`, without weights, where blocks of ``model`` have experts."""
    for block in model.get_submodule(family.blocks):
        if family.experts and _has(block, family.experts):
            block.set_submodule(family.experts, Experts.like(block.get_submodule(family.experts)))


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def linear_layers(stack: Stack, block: nn.Module) -> tuple[str, ...]:
    """Paths inside ``block`` of every linear layer that a site feeds."""
    return tuple(path for site in stack.sites_in(block) for path in site.consumers)


def block_names(family: Family, model: nn.Module) -> list[str]:
    """Every block of ``model`` by its name, in the order of execution."""
    return [f"{s.blocks}.{i}" for s in family.stacks for i in range(len(model.get_submodule(s.blocks)))]
