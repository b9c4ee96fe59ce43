"""Every refusal to resume names the way that does what was meant, and the way works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.checkpoint import checkpoints
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.run import train
from blip3o_dit.utils.checksums import seal
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for

pytestmark = pytest.mark.usefixtures("no_curves")

AUTO = ["--resume_from_checkpoint", "auto"]


@dataclass(frozen=True)
class Places:
    """The folder of a run that has taken two steps, its data, and where else things are."""

    run: Path
    new: Path
    store: Path
    other: Path
    wide: Path

    def flags(self, words: Sequence[str]) -> list[str]:
        return [word.format(**vars(self)) for word in words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("trained")
    stores = {"store": {}, "other": {"samples": 54}, "wide": {"condition": 16}}
    for name, sizes in stores.items():
        write_linear_store(folder / name, **sizes)
    places = Places(run=folder / "run", new=folder / "new", **{name: folder / name for name in stores})
    quick = dict(max_steps=2, num_epochs=10.0, save_steps=2, eval_split=0.0, warmup_steps=0)
    train(config_for(EmbeddingStore(places.store), places.run, **quick))
    return places


@pytest.fixture
def places(trained: Places, tmp_path: Path) -> Places:
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    return replace(trained, run=run, new=tmp_path / "new")


def again(*words: str, output: str = "run", data: str = "store") -> list[str]:
    return ["--embeddings_path", f"{{{data}}}", "--output_dir", f"{{{output}}}", "--device", "cpu", *words]


FROM_WEIGHTS = "a new run can start from its weights: --init_from {run}/checkpoint-2 --output_dir NEW"
START = ("--init_from", "{run}/checkpoint-2", "--max_steps", "1", "--batch_size", "4", "--eval_split", "0")
EXTEND = "--extend_epochs N (or --extend_steps N) trains further"
ANOTHER = "a run of its own: leave out --resume_from_checkpoint, and give another --output_dir"
SMALL = (
    "--model_dim",
    "16",
    "--num_layers",
    "1",
    "--num_heads",
    "2",
    "--max_steps",
    "1",
    "--eval_split",
    "0",
)
NEWEST = "--resume_from_checkpoint auto takes the newest whole one in --output_dir"


def cut_the_newest(places: Places) -> None:
    file = places.run / "checkpoint-2" / "optimizer.safetensors"
    shutil.copytree(places.run / "checkpoint-2", places.run / "checkpoint-1")
    file.write_bytes(file.read_bytes()[:-1])


def as_it_was_with_decay(places: Places) -> None:
    file = places.run / "checkpoint-2" / "optimizer.json"
    values = json.loads(file.read_text())
    values["param_groups"][0]["params"].append(values["param_groups"][1]["params"].pop())
    file.write_text(json.dumps(values))
    seal(file.parent)


# What was given, what the refusal says of the way, and the way.
REFUSALS: dict[str, tuple[list[str], str, list[str]]] = {
    "other data": (again(*AUTO, data="other"), FROM_WEIGHTS, again(*START, output="new", data="other")),
    "other widths": (again(*AUTO, data="wide"), ANOTHER, again(*SMALL, output="new", data="wide")),
    "samples of a step": (again(*AUTO, "--batch_size", "4"), FROM_WEIGHTS, again(*START, output="new")),
    "more epochs": (again(*AUTO, "--num_epochs", "20"), EXTEND, again(*AUTO, "--extend_epochs", "0.5")),
    "more steps": (again(*AUTO, "--max_steps", "4"), EXTEND, again(*AUTO, "--extend_steps", "2")),
    "another rate": (
        again(*AUTO, "--learning_rate", "1e-4", "--warmup_steps", "1"),
        EXTEND,
        again(*AUTO, "--learning_rate", "1e-4", "--warmup_steps", "1", "--extend_steps", "1"),
    ),
    "another seed": (again(*AUTO, "--seed", "7"), FROM_WEIGHTS, again(*START, "--seed", "7", output="new")),
    "another dropout": (
        again(*AUTO, "--cfg_dropout", "0.3"),
        FROM_WEIGHTS,
        again(*START, "--cfg_dropout", "0.3", output="new"),
    ),
    "another width": (again(*AUTO, "--model_dim", "16"), ANOTHER, again(*SMALL, output="new")),
    "another start": (again(*AUTO, "--init_from", "{run}"), ANOTHER, again(*START, output="new")),
    "a new run there": (again(*SMALL), "give --resume_from_checkpoint auto to continue it", again(*AUTO)),
    "further, there": (again(*SMALL), "--extend_epochs N to train a", again(*AUTO, "--extend_steps", "1")),
    "a run there, over": (
        again(*SMALL),
        "--overwrite_output_dir to start over",
        again(*SMALL, "--overwrite_output_dir"),
    ),
    "a run there, elsewhere": (again(*SMALL), "or another --output_dir", again(*SMALL, output="new")),
    "no such checkpoint": (again("--resume_from_checkpoint", "{run}/checkpoint-9"), NEWEST, again(*AUTO)),
    "a model folder": (
        again("--resume_from_checkpoint", "{run}"),
        "from the weights of a model folder, with --init_from",
        again("--init_from", "{run}", *START[2:], output="new"),
    ),
    "a cut checkpoint": (again("--resume_from_checkpoint", "{run}/checkpoint-2"), NEWEST, again(*AUTO)),
    "an older optimizer": (again(*AUTO), FROM_WEIGHTS, again(*START, output="new")),
    "nothing to extend": (
        again(*AUTO, "--extend_epochs", "1", output="new"),
        "--init_from starts a new run from a model's weights",
        again(*START, output="new"),
    ),
    "over its own start": (
        again("--init_from", "{run}", "--overwrite_output_dir"),
        "give another --output_dir",
        again(*START, output="new"),
    ),
    "the weights' settings": (
        again("--init_from", "{run}", "--model_dim", "16", output="new"),
        "leave them out, or train without --init_from",
        again(*START, output="new"),
    ),
}
DAMAGE: dict[str, Callable[[Places], None]] = {
    "a cut checkpoint": cut_the_newest,
    "an older optimizer": as_it_was_with_decay,
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_the_way_and_the_way_works(
    places: Places, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    given, said, way = REFUSALS[case]
    DAMAGE.get(case, lambda places: None)(places)
    assert main(places.flags(given)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and said.format(**vars(places)) in error
    assert main(places.flags(way)) == 0, capsys.readouterr().err


def test_a_run_is_not_continued_in_the_folder_of_another(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their checkpoints would be mixed, and auto would take the other one's."""
    shutil.copytree(places.run, places.new)
    given = again("--resume_from_checkpoint", "{run}/checkpoint-2", output="new")
    assert main(places.flags(given)) == 2
    assert "expected no run there, found one" in capsys.readouterr().err


def test_auto_continues_a_run_that_began_with_a_model_or_begins_it(places: Places) -> None:
    """One command for the first launch and for every later one; the model is needed for the first alone."""
    command = places.flags(again(*AUTO, *START, output="new"))
    assert main(command) == 0
    began = TrainingConfig.from_folder(places.new)
    assert began.init_from == f"{places.run}/checkpoint-2" and len(began.init_checksum) == 64
    shutil.rmtree(places.run)
    assert main(command) == 0
    assert TrainingConfig.from_folder(places.new) == began


def test_where_to_train_is_known_to_a_run_that_is_resumed(places: Places, trained: Places) -> None:
    given = ["--resume_from_checkpoint", str(trained.run / "checkpoint-2"), "--extend_steps", "1"]
    assert main(given) == 0
    assert [path.name for path in checkpoints(trained.run)][:1] == ["checkpoint-3"]
    assert read_log(trained.run / LOG_FILE)[-1]["step"] == 3
