"""The Hugging Face hub: what is fetched from there by name, and what is sent there.

A model is named `owner/name`, or `owner/name@revision` (a branch, a tag or a commit). A folder of that name
comes first, and a mistyped folder is not looked up (see `is_hub_id`). Tokens, the cache and the server are
those of huggingface_hub: HF_TOKEN or `hf auth login`, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip3o_dit.utils.checksums import CHECKSUMS_FILE
from blip3o_dit.utils.json_files import one_line
from blip3o_dit.utils.progress import has_terminal, working
from blip3o_dit.utils.validation import check_name, is_hub_id

# What of a model's repository is read here, beside its weights; whatever else lies there is not fetched.
MODEL_FILES = (
    *("config.json", "training_config.json", "distillation_config.json", "towers.json"),
    *("model.safetensors.index*.json", CHECKSUMS_FILE),
)
CARD_FILE = "README.md"
# Averaged weights, which inference uses, and those of the last step.
AVERAGED, RAW = "model.ema*.safetensors", "model*.safetensors"


def model_folder(name: str | Path, *, weights: str = "auto") -> Path:
    """The folder of a model: what was named, or what the hub has under that name, fetched.

    Args:
        weights: "auto" fetches the averaged ones, or those of the last step where there are none; "ema" the
            first, "raw" the second.

    Raises:
        FileNotFoundError: no folder has the name, and the hub does not give it.
    """
    check_name("weights", weights, ("auto", "ema", "raw"))
    if not names_a_repository(name):
        return Path(name)
    repository, _, revision = str(name).partition("@")
    averaged = [] if weights == "raw" else [AVERAGED]
    folder = download(repository, revision or None, [*MODEL_FILES, *(averaged or [RAW])])
    if weights == "auto" and not list(folder.glob(AVERAGED)):
        folder = download(repository, folder.name, [*MODEL_FILES, RAW])
    return folder


def names_a_repository(name: str | Path) -> bool:
    """Whether a model's name is `owner/name` or `owner/name@revision` of the hub, and no folder's."""
    return is_hub_id(name) and is_hub_id(str(name).partition("@")[0]) and str(name).count("/") == 1


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a hub repository whose names match, in the hub's cache; the folder's name is the commit.

    Raises:
        FileNotFoundError: the hub does not give them, and they are not in the cache; with its reason.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _shown(f"fetching {repository} from the hub"):
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error, max_length=120)
        raise FileNotFoundError(
            f"{repository}: expected a folder, or a repository on the hub, found nothing there, and the hub "
            f"did not give it: {reason}"
        ) from error


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """The hub's own bars in a terminal, a line of ours elsewhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if has_terminal() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        with working(what):
            yield
    finally:
        enable_progress_bars()


class Repository:
    """A repository on the hub, made if it is not there, that files are sent to.

    Args:
        name: `owner/name`.
        kind: "model" or "dataset".
        private: seen by its owner only; of one that is there nothing changes.
        revision: a branch, which is made if it is not there.

    Raises:
        ValueError: the hub refuses: the name, no token, no right to write there; with its reason.
    """

    def __init__(
        self, name: str, *, kind: str = "model", private: bool = False, revision: str | None = None
    ) -> None:
        from huggingface_hub import HfApi

        self.name, self.kind, self.revision = name, kind, revision
        self._api = HfApi()
        with self._refusals():
            made = self._api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True)
            self.name = made.repo_id
            if revision is not None:
                self._api.create_branch(self.name, repo_type=kind, branch=revision, exist_ok=True)

    def send(
        self, folder: Path, patterns: Sequence[str], *, card: str | None = None, message: str | None = None
    ) -> str:
        """Send the files of a folder whose names match, in place of those there that match; returns the page.

        Args:
            card: README.md, where the folder has none.

        Raises:
            ValueError: as for the repository itself.
        """
        place: dict[str, Any] = {"repo_id": self.name, "repo_type": self.kind, "revision": self.revision}
        with self._refusals(), _shown(f"sending {folder} to {self.name}"):
            if card is not None and not (folder / CARD_FILE).is_file():
                self._api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD_FILE, **place)
            self._api.upload_folder(
                folder_path=folder,
                allow_patterns=[*patterns, CARD_FILE],
                delete_patterns=list(patterns),
                commit_message=message,
                **place,
            )
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{self._api.endpoint}/{kind}{self.name}"

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """One line of what the hub refuses, or of why it cannot be asked."""
        # HTTPError is that of whichever HTTP library huggingface_hub uses.
        from huggingface_hub.errors import HFValidationError, HTTPError

        try:
            yield
        except (HTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"{self.name}: the hub did not take it: {one_line(error)}") from error
