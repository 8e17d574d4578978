"""Weights of HuggingFace's hub: from `hf://ORG/NAME[@REVISION][/FILE]` to a file in its cache.

`huggingface_hub` fetches and keeps the files, so that its variables apply (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT), and its locks: of processes that share a cache one downloads a file,
and the others wait for it.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from maect_jax.convert import tensors
from maect_jax.errors import UserError, first_of, shown

_FORM = "hf://ORG/NAME[@REVISION][/FILE]"
_ID = re.compile(
    r"hf://(?:models/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<file>.+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".tar", ".index.json")
_LOGIN = "log in (hf auth login, or HF_TOKEN)"
_LOGGER = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """Weights in the hub's cache."""

    path: Path  # of their file, or of the list of their parts, with its parts and configs beside it
    name: str  # of the model: the repository's, or the file's if that has a name of its own
    id: str  # with the commit and the file, and so the same for all time
    named: str  # the id that the user gave

    def read(self) -> tensors.Content:
        """Its tensors (`tensors.read`)."""
        try:
            return tensors.read(self.path)
        except tensors.DamagedError as error:
            repo, _, rest = self.id.removeprefix("hf://").partition("@")
            commit, _, file = rest.partition("/")
            file = str(PurePosixPath(file).with_name(error.file))
            again = f"hf download {repo} {file} --revision {commit} --force-download"
            raise UserError(f"{error}. To get it again: {again}") from error


def is_id(text: str) -> bool:
    """Whether a text means something on the hub, and not a path."""
    return text.startswith("hf:")


def fetch(named: str, noted: Mapping[str, str] | None = None, download: bool = True) -> Fetched:
    """Fetches the weights that an id names, and what is written beside them.

    Args:
      named: the id. Without a file in it the weights are chosen as in a folder (`tensors.read`).
      noted: ids that were resolved before, with the ids that they became; these are taken.
      download: whether to fetch what the cache lacks.

    Raises:
      UserError: there is no such repository, revision or file, none that holds weights or several,
        it is neither accessible nor in the cache, or `huggingface_hub` is not installed.
    """
    match = _ID.fullmatch((noted or {}).get(named, named))
    if not match:
        raise UserError(f"{shown(named)}: must be {_FORM}, such as hf://facebook/vit-mae-base")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        install = "pip install huggingface_hub"
        raise UserError(f"{named}: needs huggingface_hub, the extra [hub]: {install}") from error
    revision, file = unquote(match["revision"] or "main"), match["file"] or ""
    repository = _Repository(named, match["repo"], revision, download)
    commit = revision
    if not (_COMMIT.fullmatch(revision) and file.endswith(_ENDINGS)):
        commit, inside, reason = repository.listed(file)
        file = _choose(named, file.rstrip("/"), inside)
        if reason:
            text = "%s: the hub was not asked (%s); takes %s of commit %s from its cache"
            _LOGGER.warning(text, named, reason, file, commit)
        if reason or not download:
            # Else by its branch, so that the cache knows that one at times without a network.
            repository = repository._replace(revision=commit)
    if ".safetensors" not in file:  # before a pickle is downloaded that nothing can read
        tensors.import_torch(f"{named}: {file}")
    path = repository.get(file)
    if path.parents[file.count("/")].name != commit:
        raise UserError(f"{named}: has just changed on the hub; run the same command again")
    repository = repository._replace(revision=commit)
    if path.name in tensors.WEIGHTS:
        for name in tensors.BESIDE:
            repository.get_if_any(str(PurePosixPath(file).with_name(name)))
    if path.name in tensors.INDEXES:
        for name in sorted(set(tensors.parts_of(path).values())):
            repository.get(str(PurePosixPath(file).with_name(name)))
    name = match["repo"].split("/")[1] if path.name in tensors.WEIGHTS else path.stem
    return Fetched(path, name, f"hf://{match['repo']}@{commit}/{file}", named)


def _choose(named: str, where: str, inside: Sequence[str]) -> str:
    """The file with the weights of a repository, of whose files `where` names one or a folder."""
    if where in inside:
        return where
    below = [name for name in inside if name.startswith(f"{where}/" if where else "")]
    here = [name for name in below if str(PurePosixPath(name).parent) == (where or ".")]
    by_name = {PurePosixPath(name).name: name for name in here}
    if usual := next((name for name in tensors.WEIGHTS if name in by_name), None):
        return by_name[usual]
    weights = [name for name in here if name.endswith(_ENDINGS)]
    safe = [name for name in weights if name.endswith(".safetensors")]
    if len(safe or weights) == 1:
        return (safe or weights)[0]
    if where and not below:
        raise UserError(f"{named}: has no such file; an id is {_FORM}")
    if several := weights or [name for name in below if name.endswith(_ENDINGS)]:
        raise UserError(f"{named}: name one of its files ({_FORM}): {first_of(sorted(several))}")
    raise UserError(f"{named}: holds no weights; it has {first_of(sorted(below)) or 'no file'}")


class _Repository(NamedTuple):
    """A repository at a revision."""

    named: str  # the user's id, for errors
    id: str  # `ORG/NAME`
    revision: str  # a branch, a tag or a commit
    download: bool  # whether to fetch what the cache lacks

    def listed(self, where: str) -> tuple[str, list[str], str]:
        """The commit, the names of its files, and why the hub could not be asked for them, if so.

        Then they are those in the cache, which must hold weights at `where`, the start of a name.
        """
        import huggingface_hub as hub
        from huggingface_hub import constants, errors

        with self._explained():
            try:
                seconds = constants.HF_HUB_ETAG_TIMEOUT  # as for files; else it waits for ever
                info = hub.HfApi().model_info(self.id, revision=self.revision, timeout=seconds)
                return f"{info.sha}", [x.rfilename for x in info.siblings or ()], ""
            except Exception as error:  # each version has other kinds for a network that fails
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if isinstance(error, errors.HFValidationError) or (status < 500 and status != 429):
                    raise
                try:
                    # Without patterns it would refuse a commit of which some files are absent.
                    cached = hub.snapshot_download(
                        self.id, revision=self.revision, local_files_only=True, allow_patterns=[]
                    )
                except errors.LocalEntryNotFoundError as absent:
                    raise absent from error
                found = [x for x in Path(cached).rglob("*") if x.is_file()]
                inside = [x.relative_to(cached).as_posix() for x in found]
                if not any(x.startswith(where) and x.endswith(_ENDINGS) for x in inside):
                    raise errors.LocalEntryNotFoundError("no weights") from error
                is_offline = isinstance(error, errors.OfflineModeIsEnabled)
                return Path(cached).name, inside, "HF_HUB_OFFLINE" if is_offline else _said(error)

    def get(self, file: str) -> Path:
        """A file, from the cache or the hub."""
        from huggingface_hub import hf_hub_download

        with self._explained():
            return Path(
                hf_hub_download(
                    self.id, file, revision=self.revision, local_files_only=not self.download
                )
            )

    def get_if_any(self, file: str) -> None:
        """A file that the repository need not have."""
        import huggingface_hub as hub
        from huggingface_hub import errors

        known = hub.try_to_load_from_cache(self.id, file, revision=self.revision)
        if known is not None:  # the file, or that there is none
            return
        try:
            self.get(file)
        except UserError as error:
            if isinstance(error.__cause__, errors.LocalEntryNotFoundError):
                _LOGGER.warning(
                    "%s: %s is not in the hub's cache, and may exist; what it says is not used",
                    self.named, file,
                )  # fmt: skip
            elif not isinstance(error.__cause__, errors.EntryNotFoundError):
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Makes one line of whatever `huggingface_hub` raises."""
        from huggingface_hub import constants, errors

        at = constants.ENDPOINT
        try:
            yield
        except Exception as error:
            cause = error.__cause__ or error
            elsewhere = f"or get it where there is a network: hf download {self.id}"
            absent = f"is not in the hub's cache ({constants.HF_HUB_CACHE}), and "
            if not self.download:
                absent += "a dry run downloads nothing; run it, or import it by maect import"
            elif constants.HF_HUB_OFFLINE:
                absent += f"HF_HUB_OFFLINE is set; unset it, {elsewhere}"
            else:
                absent += f"{at} cannot be reached ({_said(cause)}); try again, {elsewhere}"
            reasons = {
                errors.GatedRepoError: f"is gated; ask for access at {at}/{self.id}, and {_LOGIN}",
                errors.RepositoryNotFoundError: f"there is no such repository at {at}, or it is "
                f"private; check its name, or {_LOGIN}",
                errors.RevisionNotFoundError: f"has no revision {self.revision!r}; name a branch, "
                "a tag or a commit",
                errors.LocalEntryNotFoundError: absent,
                errors.EntryNotFoundError: f"has no such file; an id is {_FORM}",
                errors.HFValidationError: f"is not an id of the hub: {_said(error)}",
                Exception: f"cannot be fetched from {at}: {_said(error)}",
            }
            why = next(text for kind, text in reasons.items() if isinstance(error, kind))
            raise UserError(f"{self.named}: {why}") from error


def _said(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)
