"""Key tables: the original (LDM, CompVis) single-file layout <-> the native one (layer 2).

Native keys are those of a published weights folder; only the single file needs a map. A table gives
for each native key the original one. The two layouts hold the same numbers, except that the
autoencoder's attention is stored as 1x1 convolutions in the original.
"""

from collections.abc import Iterable

from ipx2p.models.text import PREFIX
from ipx2p.models.unet import ATTENTION_BLOCK, UNetConfig
from ipx2p.models.vae import VAEConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
EMA_PREFIX = "model_ema."

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}

# In original checkpoints, and left out on purpose: the schedule, which the config describes; the
# bookkeeping of the average; CLIP's constant position ids; the autoencoder's training loss.
DROPPED = {
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.decay",
    "model_ema.num_updates",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
}
DROPPED_PREFIXES = ("loss.", "first_stage_model.loss.")


def is_dropped(key: str) -> bool:
    """Whether an original key is left out on purpose."""
    return key in DROPPED or key.startswith(DROPPED_PREFIXES) or key.endswith(".position_ids")


def ema_key(key: str) -> str:
    """The name under which an original checkpoint keeps the average of a U-Net key: no dots."""
    return EMA_PREFIX + key.removeprefix("model.").replace(".", "")


def unet_table(config: UNetConfig, keys: Iterable[str]) -> dict[str, str]:
    """Native -> original for the keys of a U-Net."""
    stride = config.layers_per_block + 1
    prefixes = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    for level in range(config.levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        first_in, first_out = 1 + level * stride, level * stride
        for layer in range(stride):
            prefixes[f"{down}.resnets.{layer}."] = f"input_blocks.{first_in + layer}.0."
            prefixes[f"{down}.attentions.{layer}."] = f"input_blocks.{first_in + layer}.1."
            prefixes[f"{up}.resnets.{layer}."] = f"output_blocks.{first_out + layer}.0."
            prefixes[f"{up}.attentions.{layer}."] = f"output_blocks.{first_out + layer}.1."
        # The layer that changes the resolution stands last in its block, behind any attention.
        last_in, last_out = first_in + stride - 1, first_out + stride - 1
        has_attention = config.down_block_types[-1 - level] == ATTENTION_BLOCK
        prefixes[f"{down}.downsamplers.0.conv."] = f"input_blocks.{last_in}.0.op."
        prefixes[f"{up}.upsamplers.0.conv."] = f"output_blocks.{last_out}.{1 + has_attention}.conv."
    return {key: UNET_PREFIX + _rename(key, prefixes, UNET_RESNET) for key in keys}


def vae_table(config: VAEConfig, keys: Iterable[str]) -> dict[str, str]:
    """Native -> original for the keys of an autoencoder, without `first_stage_model.`."""
    levels = len(config.block_out_channels)
    prefixes = {
        f"{side}.{native}": f"{side}.{original}"
        for side in ("encoder", "decoder")
        for native, original in (
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            ("conv_norm_out.", "norm_out."),
        )
    }
    for level in range(levels):
        # The original counts the decoder's levels from the picture, not from the latents.
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(config.layers_per_block + 1):
            prefixes[f"encoder.down_blocks.{level}.resnets.{layer}."] = f"{down}.block.{layer}."
            prefixes[f"decoder.up_blocks.{level}.resnets.{layer}."] = f"{up}.block.{layer}."
        prefixes[f"encoder.down_blocks.{level}.downsamplers.0."] = f"{down}.downsample."
        prefixes[f"decoder.up_blocks.{level}.upsamplers.0."] = f"{up}.upsample."
    return {
        key: _rename(key, prefixes, VAE_ATTENTION if ".attentions." in key else VAE_RESNET)
        for key in keys
    }


def text_table(keys: Iterable[str]) -> dict[str, str]:
    """Native -> original for the keys of the text encoder."""
    return {key: f"{TEXT_PREFIX}{PREFIX}{key}" for key in keys}


def _rename(key: str, prefixes: dict[str, str], layers: dict[str, str]) -> str:
    """Swap the prefix that names the block, then the name of the layer inside it."""
    for native, original in prefixes.items():
        if key.startswith(native):
            layer, _, parameter = key.removeprefix(native).rpartition(".")
            return f"{original}{layers.get(layer, layer)}{'.' if layer else ''}{parameter}"
    return key
