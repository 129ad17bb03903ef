"""Make the random text encoder of this folder: `python assets/tiny/make_text_encoder.py`.

It tells sentences apart and knows nothing of language. The vocabulary is that of the test reference
(`tests/golden/diffusers/tokenizer`), 625 tokens.
"""

from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.models.text import TextEncoder, load_tokenizer

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "tests" / "golden" / "diffusers" / "tokenizer"
CONFIG = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 623,
    "eos_token_id": 624,
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 624,
    "projection_dim": 64,
    "vocab_size": 625,
}

torch.manual_seed(0)
model = CLIPTextModel(CLIPTextConfig.from_dict(CONFIG)).half()
TextEncoder(model, CONFIG, *load_tokenizer(TOKENIZER)).save(HERE)
ScheduleConfig(prediction_type="v_prediction").write(HERE / "scheduler" / "scheduler_config.json")
