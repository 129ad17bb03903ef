"""Fields of published config files, their bounds and the values supported here (layer 0).

One `Layout` for each kind of file in a weights folder, by the class that the file names. A field
that would change the network must have the one supported value; fields that do not matter here are
listed; every other field must be off.
"""

import types
import typing
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any

from ipx2p.errors import InputError

Fields = dict[str, Any]
MAX_ENTRIES = 8  # of a list in a config: levels of a network

Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Layout:
    """How a published file differs from the dataclass that it is read into.

    bounds: the least and the most of numbers, or of each number in a list.
    supported: other fields, with the one value that is honoured.
    harmless: other fields whose value does not matter here.
    defaults: what a missing field means there, where it is not what it means here.
    unpack, pack: published fields to those of the dataclass, and back.
    derived: published fields that follow from the sizes.
    """

    bounds: Bounds
    supported: Mapping[str, Any]
    harmless: Set[str]
    defaults: Fields
    unpack: Callable[[Fields], Fields] = dict
    pack: Callable[[Fields], Fields] = dict
    derived: Callable[[Fields], Fields] = field(default=lambda fields: {})


def unpack_heads(raw: Fields) -> Fields:
    """`attention_head_dim` holds the number of heads, in spite of its name: one for all levels, or
    one for each."""
    fields = {name: raw[name] for name in raw.keys() - {"attention_head_dim"}}
    heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
    widths = raw.get("block_out_channels") or [320, 640, 1280, 1280]
    if isinstance(heads, int) and isinstance(widths, list):
        heads = [heads] * len(widths)
    return fields | {"num_attention_heads": heads}


def pack_heads(fields: Fields) -> Fields:
    """The number of heads under its published name."""
    heads = fields["num_attention_heads"]
    rest = {name: value for name, value in fields.items() if name != "num_attention_heads"}
    return rest | {"attention_head_dim": heads[0] if len(set(heads)) == 1 else heads}


def mirrored_blocks(fields: Fields) -> Fields:
    """The expanding path of a U-Net mirrors its contracting path."""
    down = reversed(fields["down_block_types"])
    return {"up_block_types": [name.replace("Down", "Up") for name in down]}


def plain_blocks(fields: Fields) -> Fields:
    """The blocks of an autoencoder are the same at every level."""
    levels = len(fields["block_out_channels"])
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


SIZES = {  # bounds that the U-Net and the autoencoder share
    "block_out_channels": (1, 16_384), "norm_num_groups": (1, 16_384), "layers_per_block": (1, 6),
}  # fmt: skip

LAYOUTS = {
    "UNet2DConditionModel": Layout(
        bounds=SIZES | {
            "out_channels": (4, 4), "sample_size": (1, 512), "norm_eps": (0, 1),
            "num_attention_heads": (1, 1024),
            "transformer_layers_per_block": (1, 12), "cross_attention_dim": (1, 65_536),
        },
        supported={
            "act_fn": "silu", "attention_type": "default", "dropout": 0.0,
            "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1,
            "flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional",
            "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_out_scale_factor": 1.0, "resnet_time_scale_shift": "default",
        },
        # Attention accumulates in float32 either way; heads of an embedding that is off.
        harmless={"upcast_attention", "addition_embed_type_num_heads"},
        defaults={"in_channels": 4, "cross_attention_dim": 1280, "sample_size": None},
        unpack=unpack_heads,
        pack=pack_heads,
        derived=mirrored_blocks,
    ),
    "AutoencoderKL": Layout(
        bounds=SIZES | {"latent_channels": (4, 4), "scaling_factor": (1e-6, 1e6)},
        supported={
            "act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True,
            "use_post_quant_conv": True, "use_quant_conv": True,
        },
        # Sizes of the training pictures, and a note on float16 for other libraries.
        harmless={"sample_size", "force_upcast"},
        defaults={"block_out_channels": [64], "layers_per_block": 1},
        derived=plain_blocks,
    ),
    "FeatureWrapping": Layout(bounds=SIZES, supported={}, harmless=set(), defaults={}),
    "EulerDiscreteScheduler": Layout(
        bounds={"num_train_timesteps": (2, 100_000), "steps_offset": (0, 100_000)},
        supported={"trained_betas": None, "predict_epsilon": True},
        # They choose a sampler or its options, which are arguments of an edit here.
        harmless={
            "algorithm_type", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio",
            "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type",
            "lambda_min_clipped", "lower_order_final", "sample_max_value", "set_alpha_to_one",
            "skip_prk_steps", "solver_order", "solver_type", "thresholding", "time_shift_type",
            "timestep_spacing", "timestep_type", "use_karras_sigmas", "variance_type",
        },
        defaults={
            "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0,
        },
    ),
}  # fmt: skip

TEXT_BOUNDS = {  # of a text encoder, whose config is that of transformers
    "hidden_size": (1, 16_384), "projection_dim": (1, 16_384), "intermediate_size": (1, 65_536),
    "num_attention_heads": (1, 256), "num_hidden_layers": (1, 100),
    "max_position_embeddings": (3, 1024), "vocab_size": (1, 1_000_000),
    "layer_norm_eps": (0, 1), "eos_token_id": (0, 1_000_000),
}  # fmt: skip

# The text encoder of Stable Diffusion 1.x: CLIP ViT-L/14.
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}


def typed_fields(kind: type, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a dataclass that a file holds, each of the type of its field."""
    values = {}
    for one in fields(kind):
        if one.name in raw:
            value = raw[one.name]
            if not _is_a(value, one.type):
                is_plain = one.type in (int, float, bool, str)
                expected = one.type.__name__ if is_plain else one.type
                raise InputError(f"{where}: {one.name} is {value!r:.200}, expected {expected}")
            values[one.name] = float(value) if one.type is float else value
    return values


def check_bounds(values: Mapping[str, Any], bounds: Bounds, where: str) -> None:
    """Raise InputError for the first value, or list of values, that is out of its bounds."""
    for name, (low, high) in bounds.items():
        value = values.get(name, low)
        many = value if isinstance(value, list) else [value]
        if not all(_is_a(one, float) and low <= one <= high for one in many):
            expected = f"{low} to {high}" if low < high else low
            raise InputError(f"{where}: {name} is {value!r:.200}, expected {expected}")
        if not 1 <= len(many) <= MAX_ENTRIES:
            raise InputError(
                f"{where}: {name} has {len(many)} entries, expected 1 to {MAX_ENTRIES}"
            )


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        (entry,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_a(one, entry) for one in value)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if kind is float:  # neither infinite nor NaN
        return type(value) in (int, float) and -1e300 < value < 1e300
    return type(value) is kind
