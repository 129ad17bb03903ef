"""The tokenizer and the text encoder of `assets/tiny`: `python assets/recipes/text_encoder.py`.

The vocabulary is learned from the sentences below, and the encoder learns to tell which tasks a
sentence asks for: a sigmoid for each task, from the states that follow the sentence. As with CLIP,
the states of the padding see the whole sentence, and the U-Net attends to all of them. It is
trained before the U-Net and frozen then. The sentences in `unseen/` are not trained on: at the end
the script prints how many of them are understood.
"""

import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from ipx2p.data.instructions import bank, read_bank
from ipx2p.models.clip import ClipText
from ipx2p.models.text import TextEncoder, load_text, load_tokenizer

TINY = Path(__file__).parents[1] / "tiny"
TASKS = ("denoise", "enhance", "derain", "deblur", "cartoonize")
VOCABULARY, STEPS, BATCH, WIDTH = 1500, 1500, 64, 64

# What is wrong, as an adjective and as a thing; what it should be; and what one does about it.
WORDS = {
    "denoise": {
        "bad": "noisy|grainy|speckled|gritty|dirty|high-ISO",
        "thing": "noise|grain|speckles|static|sensor noise|ISO noise|graininess|random dots",
        "good": "clean|cleaner|noise-free|free of grain|smooth|less noisy|less grainy",
        "do": "denoise|clean|clean up|smooth|filter|despeckle",
    },
    "enhance": {
        "bad": "dark|dim|underexposed|low-light|gloomy|murky|shadowy|black|night|unlit|too dark",
        "thing": "darkness|shadows|dark|underexposure|low light|lack of light|gloom",
        "good": "bright|brighter|well lit|lighter|well exposed|visible|like daylight|as if by day",
        "do": "brighten|lighten|enhance|light up|illuminate|expose|relight|lift|brighten up",
    },
    "derain": {
        "bad": "rainy|wet|rain-streaked|stormy|drenched",
        "thing": "rain|raindrops|rain streaks|drops|drizzle|shower|downpour|rainfall|"
        "streaks of rain",
        "good": "dry|rain-free|free of rain|clear of rain|as if it were dry|sunny",
        "do": "derain|dry|dry up|dry out|wipe",
    },
    "deblur": {
        "bad": "blurry|blurred|fuzzy|out-of-focus|unfocused|smeared|shaky|soft|unsharp|hazy",
        "thing": "blur|fuzziness|motion blur|camera shake|softness|defocus|shake|smear",
        "good": "sharp|sharper|crisp|crisper|in focus|focused|clear and sharp|less blurry|detailed",
        "do": "deblur|sharpen|focus|refocus|sharpen up|steady|unblur",
    },
    "cartoonize": {
        "bad": "real|photographic",
        "thing": "photo look|realism",
        "good": "a cartoon|a comic|an anime|cartoonish|a drawing|like a comic|animated|a toon",
        "do": "cartoonize|draw|redraw|cartoonify|stylize|toonify|paint",
    },
}
PHOTO = "photo|picture|image|photograph|shot|scene|view|snapshot|it|this|everything|my photo|one"
THIS = "the|this|that|my|our|a"
PATTERNS = (
    "{do} {this} {photo}",
    "{do} {this} {bad} {photo}",
    "make {this} {photo} {good}",
    "make {this} {bad} {photo} {good}",
    "make it {good}",
    "{remove} {this} {thing}",
    "{remove} {this} {thing} from {this} {photo}",
    "{this} {photo} is {too} {bad}, {do} it",
    "{this} {photo} is {too} {bad}",
    "there is {too} much {thing} here",
    "I {want} {this} {photo} to be {good}",
    "I {want} {this} {photo} without {this} {thing}",
    "can you {do} {this} {photo}?",
    "can you {remove} {this} {thing}?",
    "it should look {good}",
    "turn {this} {bad} {photo} into a {good} one",
    "{good}, please",
    "no {thing}, please",
    "the {thing} ruins {this} {photo}",
    "a {good} version of {this} {photo}",
    "why is it so {bad}?",
)
OTHERS = {
    "remove": "remove|erase|delete|get rid of|take away|take out|clear|stop|fix|undo|reduce|hide",
    "too": "too|very|so|really|all|rather",
    "want": "want|need|would like|would love|prefer|wish",
    "photo": PHOTO,
    "this": THIS,
}
UNRELATED = (
    "a photo of a cat|make it snow|add a hat to the dog|turn the apple into an orange|"
    "what is this?|"
    "a castle on a hill|replace the sky|put it on the moon|as an oil painting|make him smile|"
    "do nothing|keep the picture as it is|hello|the same picture|swap the colours|add a rainbow"
)
CONFIG = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": WIDTH,
}


def drawn_sentence(draws: random.Random) -> tuple[str, set[str]]:
    """A sentence and the tasks that it asks for."""
    kind = draws.random()
    if kind < 0.05:
        return draws.choice(UNRELATED.split("|")), set()
    if kind < 0.4:
        task = draws.choice(TASKS)
        return draws.choice(bank(task)), {task}
    if kind < 0.6:
        tasks = draws.sample(TASKS[:4], 2)
        if draws.random() < 0.5:
            return draws.choice(bank("+".join(tasks))), {*tasks}
        joint = draws.choice((" and ", ", then ", " and also ", ", and "))
        return joint.join(from_grammar(task, draws) for task in tasks), {*tasks}
    task = draws.choice(TASKS)
    return from_grammar(task, draws), {task}


def from_grammar(task: str, draws: random.Random) -> str:
    """A sentence of the grammar above, at times with a word left out."""
    words = {**OTHERS, **WORDS[task]}
    pattern = draws.choice(PATTERNS)
    while "{" in pattern:
        pattern = re.sub(r"{(\w+)}", lambda m: draws.choice(words[m[1]].split("|")), pattern)
    sentence = draws.choice(("", "", "", "please ", "could you please ")) + pattern
    if draws.random() < 0.2:
        sentence = " ".join(word for word in sentence.split() if draws.random() > 0.15)
    return sentence or pattern


def make_tokenizer(sentences: list[str]) -> int:
    """Write CLIP's kind of tokenizer, byte-pair encoding of lower-case words; its size."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(vocab_size=VOCABULARY - 512, end_of_word_suffix="</w>", min_frequency=2)
    learner.train_from_iterator([sentence.lower() for sentence in sentences], trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*dict.fromkeys(tokens)]
    end = tokens[-1]
    special = {
        "bos_token": tokens[-2],
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), end),
    }
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(
            special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}, indent=2
        ),
    }
    (TINY / "tokenizer").mkdir(exist_ok=True)
    for old in (TINY / "tokenizer").iterdir():
        old.unlink()
    for name, content in files.items():
        (TINY / "tokenizer" / name).write_text(content)
    return len(tokens)


def summary(text: TextEncoder, sentences: list[str]) -> torch.Tensor:
    """The mean state from the end of each sentence on, (B, D)."""
    ids = text.tokenize(sentences)
    after = (ids == ids[:, -1:]).float()  # the end of the sentence and the padding share a token
    return (text(ids) * after[..., None]).sum(1) / after.sum(1, keepdim=True)


def main() -> None:
    draws = random.Random(0)
    torch.manual_seed(0)
    size = make_tokenizer([drawn_sentence(draws)[0] for _ in range(20_000)])
    special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    config = CONFIG | special | {"vocab_size": size}
    start = CLIPTextModel(CLIPTextConfig.from_dict(config)).state_dict()
    with torch.device("meta"):
        network = ClipText(config)
    load_text(network, start, "the start")
    text = TextEncoder(network, config, *load_tokenizer(TINY / "tokenizer"))
    head = torch.nn.Linear(WIDTH, len(TASKS))
    parameters = [*text.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        sentences, wanted = zip(*(drawn_sentence(draws) for _ in range(BATCH)), strict=True)
        labels = torch.tensor([[float(task in tasks) for task in TASKS] for tasks in wanted])
        logits = head(summary(text, [*sentences]))
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if (step + 1) % 300 == 0:
            print(f"step {step + 1}/{STEPS}  loss {loss:.4f}", flush=True)
    text.eval()
    for path in sorted((TINY / "unseen").glob("*.txt")):
        sentences = [*read_bank(path)]
        with torch.no_grad():
            chances = head(summary(text, sentences)).sigmoid()
        right = [TASKS[row.argmax()] == path.stem for row in chances]
        print(f"unseen wordings understood: {path.stem} {sum(right)} of {len(right)}")
        print(*(s for s, ok in zip(sentences, right, strict=True) if not ok), sep="\n")
    text.model.half()
    text.save(TINY)


if __name__ == "__main__":
    main()
