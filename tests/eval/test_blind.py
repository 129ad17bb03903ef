"""Blinded judging: what the page hides and saves, and what the choices say."""

import base64
import csv
import html
import io
import json
import random
import re
import shutil
import subprocess

import pytest
from PIL import Image, PngImagePlugin

import ipx2p.eval.blind
from ipx2p.cli import run_command
from ipx2p.errors import InputError
from ipx2p.eval.intervals import Estimate, share
from ipx2p.eval.records import Record, Records, key_of
from ipx2p.eval.side_by_side import Choice, find_pairs, preferences, read_choices, write_page
from ipx2p.files import digest_file, read_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
MODELS = ("mine-secret", "theirs-secret")
TRICKY = 'make it </script><b>"bold"</b> & snowy'


def run(capsys, *argv):
    """Run the command in this process; returns exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: ipx2p.eval.blind.main([str(arg) for arg in argv]))
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def write_run(folder, models=MODELS, cases=4, seeds=(0, 1), same=(), failed=()):
    """Records of a finished run whose pictures are of one colour each, and say whose they are."""
    folder.mkdir(parents=True)
    records = Records(folder)
    for number in range(cases):
        case = {"name": f"case-{number}", "group": f"photo-{number // 2}", "task": "snow"}
        case |= {"instruction": TRICKY, "source": "/a", "target": "/b", "benchmark": ""}
        for place, model in enumerate(("identity", "oracle", *models)):
            built_in = place < 2
            for seed in (None,) if built_in or seeds is None else seeds:
                key = key_of([number, model, seed])
                shade = 3 if (number, seed) in same and not built_in else place + 2
                image = Image.new("RGB", (12, 8), (number * 10, shade * 20, (seed or 0) * 30))
                info = PngImagePlugin.PngInfo()
                info.add_text("model", model)
                image.save(folder / f"{key}.png", pnginfo=info)
                digest = digest_file(folder / f"{key}.png")
                picture = {"file": f"{key}.png", "digest": digest, "width": 12, "height": 8}
                if (number, seed) in failed and model == models[0]:
                    picture = None
                settings = None if built_in or seeds is None else {"guidance": "ip2p"}
                made = {"weights_digest": model}
                records.add(Record(key, key, case, model, settings, seed, made, picture))
    return folder


def make(folder, *argv):
    ipx2p.eval.blind.main(["make", str(folder / "run"), "--output", str(folder), *map(str, argv)])
    page = (folder / "page.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*)</script>', page)[1]
    return page, json.loads(data), read_json(folder / "key.json")


def colour(data, number):
    with Image.open(io.BytesIO(base64.b64decode(data["pictures"][number]))) as image:
        assert not image.info
        return image.getpixel((0, 0))


def save_choices(path, data, chosen, **more):
    choices = [{"pair": pair, "choice": choice} for pair, choice in chosen.items()]
    path.write_text(json.dumps({"page": data["page"], "rater": "", "choices": choices} | more))
    return path


@pytest.fixture
def made(tmp_path):
    write_run(tmp_path / "run")
    return make(tmp_path)


def test_the_page_names_no_model_and_its_key_names_each_side(made):
    page, data, key = made
    assert not any(model in page for model in MODELS) and "secret" not in page
    assert len(data["pairs"]) == len(key["pairs"]) == 8
    for pair, hidden in zip(data["pairs"], key["pairs"], strict=True):
        number, seed = int(hidden["case"]["name"][-1]), hidden["seed"]
        assert pair["instruction"] == TRICKY
        assert colour(data, pair["source"]) == (number * 10, 40, 0)
        assert colour(data, pair["target"]) == (number * 10, 60, 0)
        for side in ("left", "right"):
            place = 2 + MODELS.index(hidden[side])
            assert colour(data, pair[side]) == (number * 10, (place + 2) * 20, seed * 30)
        assert {hidden["left"], hidden["right"]} == {*MODELS}


def test_order_and_sides_are_drawn_by_the_seed_alone(tmp_path):
    write_run(tmp_path / "run", cases=20)
    drawn = []
    for seed in (0, 0, 1):
        (tmp_path / "key.json").unlink(missing_ok=True)
        _, data, key = make(tmp_path, "--seed", seed)
        drawn.append((data["page"], [(p["case"]["name"], p["left"]) for p in key["pairs"]]))
        left = sum(pair["left"] == MODELS[0] for pair in key["pairs"])
        assert 10 <= left <= 30  # of 40
        used = [pair[k] for pair in data["pairs"] for k in ("source", "left", "right", "target")]
        assert [*dict.fromkeys(used)] == [*range(len(data["pictures"]))]  # stored as shown
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]


def test_pairs_without_a_difference_are_left_out_and_said(tmp_path, capsys):
    write_run(tmp_path / "run", same=[(0, 0), (1, 1)], failed=[(2, 0)])
    code, out, _ = run(capsys, "make", tmp_path / "run", "--output", tmp_path, "--limit", 4)
    counted = "4 pairs; left out: 2 with identical edits, 1 with an edit that is not finite, 1 bey"
    assert code == 0 and out.startswith(counted)


def test_three_lines_make_three_pairs_and_pictures_from_elsewhere_meet_every_seed(tmp_path):
    write_run(tmp_path / "run", models=(*MODELS, "third"), cases=1)
    write_run(tmp_path / "other", models=("folder",), cases=1, seeds=None)
    from ipx2p.eval.records import read_folders

    assert len(find_pairs(read_folders([tmp_path / "run"]))) == 3 * 2
    records = read_folders([tmp_path / "run", tmp_path / "other"])
    assert len(find_pairs(records, ["folder", "third"])) == 2
    assert len(find_pairs(records, ["folder", "oracle"])) == 1


def test_choices_become_wins_of_the_line_that_was_on_that_side(made, tmp_path, capsys):
    _, data, key = made
    chosen = {}
    for number, hidden in enumerate(key["pairs"]):
        mine = "left" if hidden["left"] == MODELS[0] else "right"
        chosen[number] = ("tie", mine, {"left": "right", "right": "left"}[mine])[number % 3]
    path = save_choices(tmp_path / "choices.json", data, chosen, rater="Ann")
    code, out, _ = run(capsys, "read", tmp_path / "key.json", path)
    row = next(csv.DictReader(io.StringIO((tmp_path / "preferences.csv").read_text())))
    assert code == 0 and (row["first"], row["second"]) == MODELS
    assert (row["wins"], row["ties"], row["losses"], row["pictures"]) == ("3", "3", "2", "2")
    assert float(row["share"]) == 0.6 and row["preferred"] == ""
    assert "| 3 / 3 / 2 |" in out and "Choices by person: Ann 8." in out


def choices_of(values, pictures, raters=("a",)):
    lines = ("x", "y")
    return [
        Choice(rater, {1: "x", 0: "y"}.get(value), lines, str(picture), "t")
        for rater in raters
        for value, picture in zip(values, pictures, strict=True)
    ]


def share_of(found):
    return Estimate(found.share, found.low, found.high)


def test_one_choice_of_each_picture_has_the_interval_of_wilson():
    (found,) = preferences(choices_of([1] * 15 + [0] * 5 + [None] * 9, range(29)))
    assert share_of(found) == share(15, 20) and found.preferred == "x"
    assert (found.wins, found.ties, found.losses) == (15, 9, 5)


def test_ten_people_who_agree_on_few_pictures_do_not_narrow_the_interval():
    values = [1, 1, 1, 1, 1, 0, 0, 1]
    (one,) = preferences(choices_of(values, range(8)))
    (ten,) = preferences(choices_of(values, range(8), raters="abcdefghij"))
    assert ten.wins == 10 * one.wins and ten.share == one.share
    assert ten.high - ten.low > 0.8 * (one.high - one.low)
    (all_alike,) = preferences(choices_of([1] * 8, range(8), raters="abc"))
    assert share_of(all_alike) == share(8, 8)  # and not 100 % without an interval


def test_ties_alone_show_nothing():
    (found,) = preferences(choices_of([None] * 4, range(4)))
    assert found.preferred == "" and found.low is None


def test_intervals_over_pictures_hold_the_true_share():
    """Three people judge 24 pictures whose own shares differ; choices are not independent."""
    draws, held, naive = random.Random(0), 0, 0
    for _ in range(300):
        values, pictures = [], []
        for picture in range(24):
            likes = draws.choice((0.3, 0.9))  # 0.6 in the mean
            values += [int(draws.random() < likes) for _ in range(3)]
            pictures += [picture] * 3
        (found,) = preferences(choices_of(values, pictures))
        held += found.low <= 0.6 <= found.high
        independent = share(sum(values), len(values))
        naive += independent.low <= 0.6 <= independent.high
    assert held / 300 >= 0.93 and naive / 300 < 0.9


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p, d: p.write_text("{"), r"c\.json is not JSON"),
        (lambda p, d: p.write_text("[]"), "holds a JSON list, expected an object"),
        (lambda p, d: save_choices(p, d, {}), "hold no choices"),
        (lambda p, d: save_choices(p, d, {0: "left"}, page="other"), "has choices of page 'other'"),
        (lambda p, d: save_choices(p, d, {99: "left"}), "choice 0 is .*each pair of 0 to 7"),
        (lambda p, d: save_choices(p, d, {0: "up"}), "choice 0 is .*with left, tie, right"),
        (lambda p, d: save_choices(p, d, {}, choices=[1]), "choice 0 is 1"),
        (lambda p, d: save_choices(p, d, {}, choices=None), "holds no list of choices"),
        (
            lambda p, d: save_choices(p, d, {}, choices=[{"pair": 1, "choice": "tie"}] * 2),
            "choice 1 is .*at most once",
        ),
    ],
)  # fmt: skip
def test_bad_choices_get_one_line(made, tmp_path, capsys, write, message):
    write(tmp_path / "c.json", made[1])
    code, _, err = run(capsys, "read", tmp_path / "key.json", tmp_path / "c.json")
    assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(message, err), err
    assert not (tmp_path / "preferences.csv").exists()


def test_a_person_counts_once(made, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for rater in ("Ann", ""):
        for path in files:
            save_choices(path, made[1], {0: "left"}, rater=rater)
        with pytest.raises(InputError, match=r"a\.json and .*b\.json are both of"):
            read_choices(tmp_path / "key.json", files)
    save_choices(files[1], made[1], {0: "right"})
    assert {choice.rater for choice in read_choices(tmp_path / "key.json", files)} == {
        *("person 1", "person 2")
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("read", "nokey.json", "c.json"), r"nokey\.json does not exist"),
        (("read", "c.json", "c.json"), r"c\.json is not the key of a page"),
        (("make", "nowhere"), "nowhere holds no records"),
        (("make", "run", "--models", "mine"), "no edits of 'mine'; did you mean mine-secret"),
        (("make", "run", "--models", "oracle"), "1 to judge .oracle., expected two or more"),
        (("make", "run", "--limit", "0"), "--limit is 0, expected 1 or more"),
        (("make",), "the following arguments are required: FOLDER"),
        ((), "required: make"),
    ],
)
def test_bad_arguments_get_one_line(made, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    save_choices(tmp_path / "c.json", made[1], {0: "left"})
    code, _, err = run(capsys, *argv)
    assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(message, err), err


def test_the_key_of_another_page_is_kept(made, tmp_path):
    before = (tmp_path / "key.json").read_bytes()
    with pytest.raises(InputError, match=r"key\.json is the key of another page"):
        make(tmp_path, "--seed", 1)
    assert make(tmp_path) == made and (tmp_path / "key.json").read_bytes() == before


def test_a_lost_picture_gets_one_line_and_no_page(tmp_path):
    folder = write_run(tmp_path / "run", cases=1)
    for path in folder.glob("*.png"):
        path.unlink()
    from ipx2p.eval.records import read_folders

    with pytest.raises(InputError, match="cannot be read"):
        write_page(find_pairs(read_folders([folder])), tmp_path, question="?", seed=0)
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "key.json").exists()


ACT = """<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const before = document.querySelector("#instruction").textContent;
for (const key of ["ArrowLeft", "0", "back", "2", "t", "ArrowDown", "1"])
  if (key === "back") find(key).click(); else press(key);
find("rater").value = "Ben"; find("rater").dispatchEvent(new Event("input"));
document.body.dataset.saved = JSON.stringify({file: choicesFile(), before, stored});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_keys_in_a_browser_make_the_choices_that_are_read(made, tmp_path):
    page, _, key = made
    (tmp_path / "driven.html").write_text(page.replace("</body>", ACT))
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    argv += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "driven.html").as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    saved = json.loads(html.unescape(re.search(r'data-saved="([^"]*)"', done.stdout)[1]))
    assert saved["before"] == TRICKY
    answers = saved["file"]
    chosen = [(one["pair"], one["choice"]) for one in answers["choices"]]
    assert chosen == [(0, "left"), (1, "right"), (2, "tie"), (3, "left")]
    assert [one["saw_target"] for one in answers["choices"]] == [False, False, True, False]
    (tmp_path / "c.json").write_text(json.dumps(answers))
    found = read_choices(tmp_path / "key.json", [tmp_path / "c.json"])
    assert [choice.rater for choice in found] == ["Ben"] * 4
    assert found[0].chosen == key["pairs"][0]["left"] and found[2].chosen is None
