"""The layers: a file imports strictly lower layers, or files above it in its package.

The rooms of a package (`ipx2p.data.published`) stand in the same order, so that there is no circle
between them. The walk sees every import node, those inside functions too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Layer by layer from the bottom; in a package, a file may import those that stand before it.
LAYERS = {
    0: [
        *(
            "ipx2p.errors",
            "ipx2p.stack",
            "ipx2p.names",
            "ipx2p.files",
            "ipx2p.cli",
            "ipx2p.config",
            "ipx2p.devices",
        ),
        *(
            "ipx2p.images",
            "ipx2p.photos",
            "ipx2p.sheets",
            "ipx2p.seeds",
            "ipx2p.tensor_files.unpickle",
        ),
        *("ipx2p.tensor_files.torch_file", "ipx2p.tensor_files.tensors"),
        *("ipx2p.published_fields", "ipx2p.published", "ipx2p.metrics", "ipx2p.distributed"),
        *("ipx2p.transfer", "ipx2p.fidelity"),
    ],
    1: [
        *("ipx2p.models.blocks", "ipx2p.models.unet", "ipx2p.models.flops"),
        "ipx2p.models.wrapping",
        *("ipx2p.models.tiling", "ipx2p.models.vae"),
        *("ipx2p.models.clip", "ipx2p.models.text"),
        *("ipx2p.diffusion.schedule", "ipx2p.diffusion.denoiser"),
        "ipx2p.diffusion.windows",
        *("ipx2p.diffusion.guidance.branches", "ipx2p.diffusion.guidance.space"),
        *("ipx2p.diffusion.guidance.scheme", "ipx2p.diffusion.guidance.linear"),
        *("ipx2p.diffusion.guidance.over_time", "ipx2p.diffusion.guidance.pushes"),
        *("ipx2p.diffusion.guidance.extra_branches", "ipx2p.diffusion.guidance.estimates"),
        *("ipx2p.diffusion.guidance.conditions", "ipx2p.diffusion.guidance.depth"),
        *("ipx2p.diffusion.guidance.plan", "ipx2p.diffusion.guidance.spec"),
        *("ipx2p.diffusion.guidance.registry", "ipx2p.diffusion.guidance.denoiser"),
        *("ipx2p.diffusion.samplers", "ipx2p.diffusion.objective"),
    ],
    2: [
        *("ipx2p.weights.readers", "ipx2p.weights.maps", "ipx2p.weights.folder"),
        *("ipx2p.weights.single_file", "ipx2p.weights.convert"),
        # what everything about data stands on
        *("ipx2p.data.listing", "ipx2p.data.workers"),
        *("ipx2p.data.light", "ipx2p.data.manifest"),
        # how photographs are degraded, and drawn as cartoons
        *("ipx2p.data.degradations.sensor", "ipx2p.data.degradations.blur"),
        *("ipx2p.data.degradations.rain", "ipx2p.data.degradations.tasks"),
        *("ipx2p.data.degradations.sheet", "ipx2p.data.instructions"),
        *("ipx2p.data.cartoons.whitebox", "ipx2p.data.cartoons.classical"),
        "ipx2p.data.cartoons.teacher",
        # what training reads
        *("ipx2p.data.pairs", "ipx2p.data.selection", "ipx2p.data.order"),
        *("ipx2p.data.loader", "ipx2p.data.shards", "ipx2p.data.cache"),
        # published sets, and making sets
        *("ipx2p.data.published.source", "ipx2p.data.published.parallel"),
        "ipx2p.data.published.folders",
        *("ipx2p.data.published.parquet", "ipx2p.data.published.edit_sets"),
        "ipx2p.data.published.registry",
        *("ipx2p.data.prepare.fingerprints", "ipx2p.data.prepare.splits"),
        *("ipx2p.data.prepare.dataset", "ipx2p.data.prepare.builder"),
        *("ipx2p.data.prepare.recipes", "ipx2p.data.prepare.where", "ipx2p.data.prepare.mix"),
        *("ipx2p.data.prepare.check", "ipx2p.data.prepare.__main__"),
    ],
    3: [
        *("ipx2p.editing.settings", "ipx2p.editing.full_size", "ipx2p.editing.decoding"),
        *("ipx2p.editing.editor", "ipx2p.editing.files"),
    ],
    4: [
        "ipx2p.editor",
        *("ipx2p.training.config", "ipx2p.training.speed", "ipx2p.training.validation"),
        *("ipx2p.training.learner", "ipx2p.training.learners"),
        *("ipx2p.training.ema", "ipx2p.training.optimizer"),
        *("ipx2p.training.checkpoint", "ipx2p.training.interrupts", "ipx2p.training.monitor"),
        *("ipx2p.training.run", "ipx2p.training.samples", "ipx2p.training.loop"),
        *("ipx2p.eval.cases", "ipx2p.eval.records", "ipx2p.eval.networks"),
        *("ipx2p.eval.views", "ipx2p.eval.scores"),
        *("ipx2p.eval.intervals", "ipx2p.eval.benchmarks.protocol"),
        *("ipx2p.eval.benchmarks.edit_sets", "ipx2p.eval.benchmarks.restoration"),
        *("ipx2p.eval.benchmarks.judged", "ipx2p.eval.benchmarks.registry"),
        *("ipx2p.eval.classical", "ipx2p.eval.models", "ipx2p.eval.built_in", "ipx2p.eval.edits"),
        *("ipx2p.eval.lines", "ipx2p.eval.sweeps", "ipx2p.eval.tables", "ipx2p.eval.grids"),
        *("ipx2p.eval.plots", "ipx2p.eval.curves", "ipx2p.eval.page"),
        *("ipx2p.eval.summary", "ipx2p.eval.reporting", "ipx2p.eval.side_by_side"),
        "ipx2p.eval.engine",
    ],
    5: [
        *("ipx2p.commands.edit", "ipx2p.commands.evaluation", "ipx2p.commands.train"),
        *("ipx2p.commands.convert", "ipx2p.commands.runner", "ipx2p.commands.questions"),
        "ipx2p.experiments",
        *("ipx2p.bench.made_up", "ipx2p.bench.turns", "ipx2p.bench.reference"),
        *("ipx2p.bench.reference_data", "ipx2p.bench.works", "ipx2p.bench.__main__"),
        *("ipx2p.eval.compare", "ipx2p.eval.evaluate", "ipx2p.eval.report"),
        *("ipx2p.eval.blind",),
    ],
    6: ["sample", "train", "convert_weights", "ipx2p.__main__"],
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
PLACE = {name: place for names in LAYERS.values() for place, name in enumerate(names)}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("ipx2p/**/*.py"), *ROOT.glob("*.py")]
    if path.name != "__init__.py"
}


def imports(source: str) -> list[tuple[int, str]]:
    """Line and full name of everything imported from the package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] in ("ipx2p", *LAYERS[6])]


def package(folder: str) -> str:
    """`ipx2p.data` for each of its rooms."""
    return ".".join(folder.split(".")[:2])


def violations(name: str, source: str) -> list[str]:
    """What a file imports that it must not, one line each."""
    folder = name.rpartition(".")[0]
    bad = []
    for line, imported in imports(source):
        if imported == "ipx2p.__version__":
            continue
        target = imported if imported in LAYER else imported.rpartition(".")[0]
        lower = LAYER[target] < LAYER[name]
        before = LAYER[target] == LAYER[name] and PLACE[target] < PLACE[name]
        theirs = target.rpartition(".")[0]
        near = package(folder) == package(theirs) or folder.startswith(f"{theirs}.")
        near = near or theirs.startswith(f"{folder}.")
        if not lower and not (before and near):
            bad.append(f"{name} line {line} imports {target}")
    return bad


def test_every_file_has_a_layer():
    assert sorted(FILES) == sorted(LAYER)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name):
    assert violations(name, FILES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ipx2p.models.unet", "from ipx2p.editing.editor import Editor"),
        ("ipx2p.models.unet", "def f():\n    from ipx2p.diffusion import schedule"),
        ("ipx2p.models.blocks", "import ipx2p.models.unet"),
        ("ipx2p.images", "from ipx2p.metrics import psnr"),
    ],
)
def test_an_import_that_goes_up_is_found(name, line):
    assert len(violations(name, line)) == 1


def reached(name: str) -> set[str]:
    """A file and all that it imports, and so on."""
    found, todo = set(), [name]
    while todo:
        if (name := todo.pop()) not in found and name in FILES:
            found.add(name)
            names = [imported for _, imported in imports(FILES[name].read_text())]
            todo += [x if x in FILES else x.rpartition(".")[0] for x in names]
    return found


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("ipx2p.data.published.folders", 7),  # reading a published set
        ("ipx2p.data.prepare.builder", 12),  # building one
        ("ipx2p.data.prepare.check", 15),
    ],
)
def test_few_files_are_needed_to_understand(name, most):
    assert len(reached(name)) <= most, sorted(reached(name))


def test_packages_are_empty_but_for_the_version():
    for path in ROOT.glob("ipx2p/*/**/__init__.py"):  # the top one also finds `Editor` when asked
        assert path.read_text() == ""


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_stay_short(name):
    source = FILES[name].read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.body[0].lineno + 1  # what stands below the signature
            limit = 120 if (name, node.name) == ("ipx2p.training.loop", "_train") else 60
            assert lines <= limit, f"{node.name} has {lines} lines"
