"""Where weights come from.

Entries that lie in this package are read from it. For published ones `pretrained=True` takes the first of these that has
them, and logs which one it was:

1. the local cache: `{cache}/{model}.{tag}/model.safetensors`, where the cache is `cache_dir`, else $TPN_CACHE, else "tpn"
   among the Hub's assets ($HF_ASSETS_CACHE);
2. the Hub: `{namespace}/{model}.{tag}`; its copy stays in the Hub's cache and is not asked for again. $TPN_HUB_NAMESPACE
   says whose repositories are trusted; by default it is `HUB_NAMESPACE`, for entries whose `converted_sha256` is known;
3. the publisher's own file, if it has a direct link: fetched, its SHA-256 compared with the digits in its name, converted
   once, and stored as 1;
4. a person: the error names the page, and the `tpn convert` command that stores the file as 1.
"""

import logging
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from timm.models import PretrainedCfg

from tpn.models.classifier import TPNClassifier
from tpn.zoo import load, saved
from tpn.zoo.checkpoint import is_whole
from tpn.zoo.convert import CheckpointError
from tpn.zoo.download import DownloadError, download, file_sha256
from tpn.zoo.hub import HubUnreachableError, NoRepositoryError, WeightsUnavailableError, hub_file
from tpn.zoo.weights import WEIGHTS, Weights

ELSEWHERE = "choose another place with TPN_CACHE or cache_dir"

Folder = str | PathLike[str] | None

_logger = logging.getLogger(__name__)


def load_pretrained(model: TPNClassifier, cfg: PretrainedCfg, entry: Weights | None, cache_dir: Folder = None) -> None:
    """Load the weights that timm's `cfg` names: its state dict, folder, Hub repository, file or link, else those of `entry`."""
    if cfg.state_dict:
        load.load_state_dict(model, cfg.state_dict)
    elif cfg.source in ("local-dir", "hf-hub"):
        load.load_checkpoint(model, saved.saved_file(cfg, saved.WEIGHTS_FILE, cache_dir))
    elif cfg.file:
        load.load_checkpoint(model, cfg.file)
    elif cfg.hf_hub_id:
        load.load_checkpoint(model, hub_file(cfg.hf_hub_id, saved.WEIGHTS_FILE, cache_dir=cache_dir))
    elif entry is not None:
        load.load_checkpoint(model, resolve(entry, cache_dir=cache_dir, url=_other_link(entry, cfg)))


def _other_link(entry: Weights, cfg: PretrainedCfg) -> str | None:
    """Return the `url` that the caller put in place of the registered one, if so."""
    registered = timm.get_pretrained_cfg(entry.name)
    if registered is None or cfg.url == registered.url:
        return None
    return cfg.url[0] if isinstance(cfg.url, tuple) else cfg.url


def load_imagenet(model: TPNClassifier, cache_dir: Folder = None) -> None:
    """Load timm's ImageNet weights of the backbone's depth into it, from the Hub or its cache."""
    load.load_imagenet(model, hub_file(load.imagenet_repo(model), saved.WEIGHTS_FILE, cache_dir=cache_dir, prefer_cached=True))


def cache_root(cache_dir: Folder = None) -> Path:
    return Path(cache_dir or os.environ.get("TPN_CACHE") or Path(constants.HF_ASSETS_CACHE, "tpn")).expanduser()


def cache_folder(entry: Weights, cache_dir: Folder = None) -> Path:
    """Return the folder that holds, or will hold, an entry's converted weights."""
    return cache_root(cache_dir) / entry.name


def resolve(entry: Weights, *, cache_dir: Folder = None, url: str | None = None) -> Path:
    """Return the path of an entry's weights, fetched and converted if need be; see the module for the order.

    Args:
        cache_dir: where they are kept.
        url: another link than the table's to a file of this architecture, such as a mirror; its name must end in
            "-" and hexadecimal digits of its SHA-256. Only the cache and this link are asked then.

    Raises WeightsUnavailableError; CheckpointError if the publisher's file is not what the table says.
    """
    if entry.embedded is not None and url is None:
        return entry.embedded
    link = _link_of(entry, url)
    folder = cache_root(cache_dir) / link.folder
    path, source = cached(folder), "the cache"
    if path is None and link.from_table:
        path, source = _from_hub(entry, cache_dir), f"the Hub, {entry.repo_id}"
    if path is None:
        path, source = from_publisher(entry, cache_dir=cache_dir, url=url), link.url
    _logger.info("weights of %s: %s, from %s", entry.name, path, source)
    return path


def store(entry: Weights, checkpoint: str | PathLike[str], folder: Path) -> Path:
    """Convert a checkpoint of an entry's architecture to `folder`; return the path of the weights there."""
    _, num_classes = load.inspect_checkpoint(checkpoint)
    model = timm.create_model(entry.name, num_classes=num_classes)
    assert isinstance(model, TPNClassifier)
    load.load_checkpoint(model, checkpoint)
    return saved.save_pretrained(model, folder) / saved.WEIGHTS_FILE


def convert(entry: Weights, checkpoint: str | PathLike[str]) -> Path:
    """Store a published checkpoint that a person fetched in the cache, for `pretrained=True`; return its path there.

    Raises CheckpointError if it is not the entry's own, by its hash where that is known, else as far as its layout and its
    number of classes tell.
    """
    if entry.embedded is not None:
        raise ValueError(f"the weights of {entry.name} come with tpn; tpn convert --output FOLDER keeps others")
    _check_published(entry, checkpoint, *load.inspect_checkpoint(checkpoint))
    folder = cache_folder(entry)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        return store(entry, checkpoint, folder)


def _check_published(entry: Weights, checkpoint: str | PathLike[str], layout: str, num_classes: int | None) -> None:
    expected = entry.dataset.num_classes
    problem = None
    if num_classes != expected:
        problem = f"it has {num_classes} classes, not {expected}"
    elif entry.sha256 is not None:
        digits = file_sha256(Path(checkpoint))
        if not digits.startswith(entry.sha256):
            other = [e.name for e in WEIGHTS.values() if e.sha256 is not None and digits.startswith(e.sha256)]
            which = f", as that of {other[0]} does: --model {other[0]}" if other else ""
            problem = f"its SHA-256 starts with {digits[:8]}{which}, not with {entry.sha256}"
    elif layout not in (entry.layout, "tpn"):
        problem = f"its names are those of {layout}, not of {entry.layout}"
    if problem:
        raise CheckpointError(
            f"{checkpoint} is not the published checkpoint of {entry.name}: {problem} (tpn convert --output FOLDER keeps others)"
        )


def _locked(folder: Path) -> AbstractContextManager[object]:
    """Of several processes that want the same weights, one fetches or converts them."""
    return WeakFileLock(folder.with_name(f".{folder.name}.lock"))


@dataclass(frozen=True)
class _Link:
    """A publisher's file: where it is, its hash (None: behind a page for people), its folder in the cache."""

    url: str
    sha256: str | None
    folder: str
    from_table: bool


def _link_of(entry: Weights, url: str | None) -> _Link:
    if url is None:
        if entry.url is None:
            raise ValueError(f"the weights of {entry.name} come with tpn")
        return _Link(entry.url, None if entry.manual else entry.sha256, entry.name, True)
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlsplit(url).path)
    if digits is None:
        raise ValueError(
            f"the name of the file at {url} does not end in digits of its SHA-256, as in 'name-0123abcd.pth'; "
            "fetch it yourself, check it, and pass it as checkpoint_path"
        )
    published = entry.sha256 is not None and digits[1].startswith(entry.sha256)
    return _Link(url, digits[1], entry.name if published else f"{entry.name}-{digits[1]}", False)


def cached(folder: Path) -> Path | None:
    """Return the weights in a cache folder; None if there are none, or, with a warning, if they are damaged."""
    path = folder / saved.WEIGHTS_FILE
    try:
        if not path.is_file():
            return None
        if is_whole(path):
            return path
    except OSError as error:
        raise WeightsUnavailableError(f"could not read {path}: {error.strerror or error}; {ELSEWHERE}") from error
    _logger.warning("%s is truncated or damaged: it is not used", path)
    return None


def _from_hub(entry: Weights, cache_dir: Folder) -> Path | None:
    """Return the Hub's copy; None if there is none, or, with a warning, if the Hub cannot say."""
    chosen = "TPN_HUB_NAMESPACE" in os.environ  # by the user, who trusts it
    if entry.repo_id is None or not (chosen or entry.converted_sha256):
        return None
    repo = entry.repo_id + (f"@{entry.revision}" if entry.revision else "")
    try:
        path = hub_file(repo, saved.WEIGHTS_FILE, cache_dir=cache_dir, prefer_cached=True)
        if not chosen and file_sha256(path) != entry.converted_sha256:
            raise WeightsUnavailableError(
                f"{path}, from {repo} on the Hub, is not the file that this version of tpn knows: its SHA-256 is not "
                f"{entry.converted_sha256}; remove it to fetch it again"
            )
        return path
    except NoRepositoryError as error:
        _logger.debug("%s", error)
    except HubUnreachableError as error:
        if entry.manual:
            raise WeightsUnavailableError(f"{error}. {_by_hand(entry)}") from error
        if not constants.HF_HUB_OFFLINE:
            _logger.warning("%s. Turning to the publisher's own file, which holds the same weights: %s", error, entry.url)
    return None


def _by_hand(entry: Weights) -> str:
    return (
        f"The weights of {entry.name} have to be fetched by hand: open {entry.url} in a browser, save the file, "
        f"then run: {convert_command(entry)}"
    )


def convert_command(entry: Weights) -> str:
    """Return what puts a file that a person fetched into the cache."""
    return f"tpn convert FILE --model {entry.name}"


def from_publisher(entry: Weights, *, cache_dir: Folder = None, url: str | None = None) -> Path:
    """Fetch and convert the publisher's file; arguments and errors are those of `resolve`."""
    link = _link_of(entry, url)
    folder = cache_root(cache_dir) / link.folder
    if link.sha256 is None:
        raise WeightsUnavailableError(_by_hand(entry))
    file = urlsplit(link.url).path.rpartition("/")[2]
    if constants.HF_HUB_OFFLINE:
        raise WeightsUnavailableError(
            f"The weights of {entry.name} are not in the cache ({folder}), and HF_HUB_OFFLINE forbids to fetch them; "
            f"unset it, or bring {file} here and run: {convert_command(entry)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            path = cached(folder)
            if path is None:
                for left_over in folder.glob(saved.INCOMPLETE + "*"):  # by a process that was killed
                    shutil.rmtree(left_over)
                download(link.url, folder / file, link.sha256)
                if link.from_table:
                    _check_published(entry, folder / file, *load.inspect_checkpoint(folder / file))
                path = store(entry, folder / file, folder)
                (folder / file).unlink()
            return path
    except DownloadError as error:
        raise WeightsUnavailableError(
            f"could not download {link.url}: {error}. Try again later, or fetch the file by other means "
            f"and run: {convert_command(entry)}"
        ) from error
    except OSError as error:
        raise WeightsUnavailableError(f"could not keep {file} in {folder}: {error.strerror or error}; {ELSEWHERE}") from error
