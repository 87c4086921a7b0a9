"""Where weights come from.

Embedded weights are read from this package. For other entries `pretrained=True` takes the first of these that has them, and logs
which one it was:

1. the cache: `{cache}/{model}.{tag}/model.safetensors`, where the cache is `cache_dir`, otherwise $TPN_CACHE, otherwise
   "tpn" among the Hub's assets ($HF_ASSETS_CACHE);
2. with $TPN_HUB_NAMESPACE, the Hub repository `{namespace}/{model}.{tag}` of that owner, whom the user trusts;
3. the entry's source: a Hub repository; a direct link, whose file is downloaded, compared with its hash, converted once, and
   stored as 1; or a page, which the error names with the `tpn convert` command that stores the downloaded file as 1.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from tpn import hub, transfer
from tpn.errors import CheckpointError, HubUnreachableError, NoRepositoryError, OfflineError, WeightsUnavailableError
from tpn.files import StrPath, file_sha256, is_intact
from tpn.models.classifier import TPNClassifier
from tpn.zoo import checkpoints, load
from tpn.zoo.checkpoints import Checkpoint, Embedded, HubFiles, Link, Page, Source
from tpn.zoo.names import WEIGHTS_FILE, by_hand, convert_command, weights_folder
from tpn.zoo.overrides import override
from tpn.zoo.saved import save_pretrained, saved_sha256

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a download."""

_OTHER_FOLDER = "choose another folder with TPN_CACHE or cache_dir"

_logger = logging.getLogger(__name__)


def weights_file(entry: Checkpoint, cache_dir: StrPath | None = None, *, url: str | None = None, verify: bool = False) -> Path:
    """Return the path of an entry's weights, fetched and converted if necessary; see the module for the order.

    Args:
        cache_dir: where they are stored.
        url: a link in place of the entry's source, such as a mirror. Its file name must end in "-" and digits of its SHA-256.
        verify: compare a file in the cache with its SHA-256 again.

    Raises:
        WeightsUnavailableError: they cannot be fetched, or only by hand; the message says what to do.
        CheckpointError: the file does not fit the entry's model.
    """
    source, folder = entry.source, weights_folder(entry, cache_dir)
    if url not in (None, source.url):
        digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlsplit(url).path)
        if digits is None:
            raise ValueError(
                f"the file name in url must end in digits of its SHA-256, as in 'name-0123abcd.pth', got {url}; "
                "download the file, check it, and pass it as checkpoint_path"
            )
        source = Link(url, digits[1])
        if not source.sha256.startswith(entry.source.sha256 or "none"):
            folder = folder.with_name(f"{entry.name}-{source.sha256}")
    elif isinstance(source, Embedded):
        return source.path
    path, origin = cached(folder, verify=verify), "the cache"
    if path is None and source is entry.source and entry.mirror:
        path, origin = _from_mirror(entry, HubFiles(entry.mirror), cache_dir, verify), f"the Hub, {entry.mirror}"
    if path is None:
        path, origin = from_source(entry, source, folder, cache_dir, verify=verify), str(source.url)
    _logger.info("weights of %s: %s, from %s", entry.name, path, origin)
    return path


def from_source(
    entry: Checkpoint, source: Source, folder: Path, cache_dir: StrPath | None = None, *, verify: bool = False
) -> Path:
    """Fetch an entry's weights from a source; `folder` is the entry's folder in the cache."""
    problem = ""
    if (folder / WEIGHTS_FILE).exists():
        problem = f"{folder / WEIGHTS_FILE} is truncated or damaged: it is not used"
        _logger.warning(problem)
    if isinstance(source, HubFiles):
        return _from_hub(source, cache_dir, verify)
    if not isinstance(source, Link):
        raise WeightsUnavailableError(f"{problem}. {by_hand(entry)}" if problem else by_hand(entry))
    file = urlsplit(source.url).path.rpartition("/")[2]
    if constants.HF_HUB_OFFLINE:
        problem = problem or f"the weights of {entry.name} are not in the cache ({folder})"
        raise OfflineError(
            f"{problem}, and HF_HUB_OFFLINE forbids requests; "
            f"unset it, or download {file} elsewhere and run: {convert_command(entry)}"
        )
    try:
        with _locked(folder):
            path = cached(folder)  # another process may have stored it meanwhile
            if path is None:
                for left_over in folder.glob(".incomplete-*"):  # of a process that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as temporary:
                    download(source, Path(temporary, file), entry)
                    path = store(entry, load.read_weights(Path(temporary, file)), folder)
            return path
    except OSError as error:
        raise WeightsUnavailableError(f"cannot store {file} in {folder}: {error.strerror or error}; {_OTHER_FOLDER}") from error


def cached(folder: Path, *, verify: bool = False) -> Path | None:
    """Return the weights in a cache folder; None if there are none, or they are damaged.

    They are compared with the SHA-256 in their config once, after they have changed, and with `verify`; see `is_intact`.
    """
    path = folder / WEIGHTS_FILE
    try:
        sound = path.is_file() and hub.is_whole(path) and is_intact(path, _record(folder), _known_sha256(folder), verify=verify)
        return path if sound else None
    except OSError as error:
        raise WeightsUnavailableError(f"cannot read {path}: {error.strerror or error}; {_OTHER_FOLDER}") from error


def store(entry: Checkpoint, weights: load.Weights, folder: Path) -> Path:
    """Save weights of an entry's model in `folder`; return their path there."""
    model = TPNClassifier.from_config(override(entry.config, num_classes=weights.num_classes))
    load.load_weights(model, weights)
    return save_pretrained(model, folder) / WEIGHTS_FILE


def convert(entry: Checkpoint, checkpoint: StrPath) -> Path:
    """Store a published checkpoint that a person downloaded in the cache, for `pretrained=True`; return its path there.

    Raises CheckpointError if it is not the entry's own: by its hash if that is known, otherwise by layout and number of classes.
    """
    if isinstance(entry.source, Embedded):
        raise ValueError(f"the weights of {entry.name} ship with tpn; tpn convert --output FOLDER stores others")
    weights = load.read_weights(checkpoint)
    problem, sha256 = "", entry.source.sha256
    if weights.num_classes != entry.config.num_classes:
        problem = f"it has {weights.num_classes} classes, not {entry.config.num_classes}"
    elif sha256 and not (digits := file_sha256(Path(checkpoint))).startswith(sha256):
        problem = f"its SHA-256 starts with {digits[:8]}, not with {sha256}"
        for other in checkpoints.CHECKPOINTS.values():
            if digits.startswith(other.source.sha256 or "none"):
                problem += f"; it is {other.name}: pass --model {other.name}"
    elif not sha256 and weights.layout not in (entry.layout, "tpn"):
        problem = f"its layout is {weights.layout}, not {entry.layout}"
    if problem:
        raise CheckpointError(
            f"{checkpoint} is not the published checkpoint of {entry.name}: {problem} (tpn convert --output FOLDER stores others)"
        )
    folder = weights_folder(entry)
    with _locked(folder):
        return store(entry, weights, folder)


def download(link: Link, path: Path, entry: Checkpoint) -> None:
    """Download a file and compare it with its hash; see `tpn.transfer` for the limits.

    $HF_HUB_DOWNLOAD_TIMEOUT limits the seconds without data. Proxies and certificates are those of the Hub's client.

    Raises WeightsUnavailableError, and OSError if the file cannot be written.
    """
    try:
        transfer.download(link.url, path, pauses=PAUSES, sha256=link.sha256)
    except transfer.TransferError as error:
        raise OfflineError(
            f"cannot download {urlsplit(link.url).path.rpartition('/')[2]}: {error}. Try again later, or download it on another "
            f"computer (tpn info {entry.name} shows the link) and run: {convert_command(entry)}"
        ) from error


def _known_sha256(folder: Path) -> str | None:
    """Return the SHA-256 in the config of a cache folder; None if there is no config that can be read."""
    with suppress(FileNotFoundError, CheckpointError):
        return saved_sha256(folder)
    return None


def _record(folder: Path) -> Path:
    """Return the place of the record of the weights in a cache folder, for `is_intact`."""
    return folder.with_name(f".{folder.name}.sha256")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one of several processes that need the same weights download or convert them."""
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
        yield


def _from_mirror(entry: Checkpoint, mirror: HubFiles, cache_dir: StrPath | None, verify: bool) -> Path | None:
    """Return the copy under $TPN_HUB_NAMESPACE; None if there is none, or, with a warning, if the Hub does not respond."""
    try:
        return _from_hub(mirror, cache_dir, verify)
    except NoRepositoryError as error:
        _logger.debug("%s", error)
    except HubUnreachableError as error:
        if isinstance(entry.source, Page):
            raise WeightsUnavailableError(f"{error}. {by_hand(entry)}") from error
        if not constants.HF_HUB_OFFLINE:
            _logger.warning("%s. Using the publisher's file instead, which holds the same weights", error)
    return None


def _from_hub(source: HubFiles, cache_dir: StrPath | None, verify: bool) -> Path:
    repo = source.repo_id + (f"@{source.commit}" if source.commit else "")
    path = hub.snapshot(repo, WEIGHTS_FILE, cache_dir=cache_dir, prefer_cached=True, verify=verify) / WEIGHTS_FILE
    if source.sha256 is not None and not hub.has_sha256(path, source.sha256):
        raise WeightsUnavailableError(
            f"{path}, from {repo} on the Hub, has another SHA-256 than {source.sha256}; remove the file to download it again"
        )
    return path
