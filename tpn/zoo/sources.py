"""Where published weights come from.

`pretrained=True` takes the first of these that has them, and logs which one it was:

1. the local cache: `{cache}/{model}.{tag}/model.safetensors`, where the cache is `cache_dir`, else $TPN_CACHE, else "tpn"
   among the Hub's assets ($HF_ASSETS_CACHE);
2. the Hub: `{namespace}/{model}.{tag}`, see `HUB_NAMESPACE`; its copy stays in the Hub's cache and is not asked for again;
3. the publisher's own file, if it has a direct link: fetched, its SHA-256 compared with the digits in its name, converted
   once, and stored as 1;
4. a person: the error names the page, and the `tpn convert` command that stores the file as 1.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

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
from tpn.zoo.weights import HUB_NAMESPACE, Weights

ELSEWHERE = "choose another place with TPN_CACHE or cache_dir"

Folder = str | PathLike[str] | None

_logger = logging.getLogger(__name__)


def load_pretrained(model: TPNClassifier, cfg: PretrainedCfg, entry: Weights, cache_dir: Folder = None) -> None:
    """Load the weights that timm's `cfg` names: its state dict, folder, Hub repository, file or link, else the table's."""
    if cfg.state_dict:
        load.load_state_dict(model, cfg.state_dict)
    elif cfg.source in ("local-dir", "hf-hub"):
        load.load_checkpoint(model, saved.saved_file(cfg, saved.WEIGHTS_FILE, cache_dir))
    elif cfg.file:
        load.load_checkpoint(model, cfg.file)
    elif cfg.hf_hub_id:
        load.load_checkpoint(model, hub_file(cfg.hf_hub_id, saved.WEIGHTS_FILE, cache_dir=cache_dir))
    else:
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
    link = _link_of(entry, url)
    folder = cache_root(cache_dir) / link.folder
    path, source = cached(folder), "the cache"
    if path is None and link.from_table:
        path, source = _from_hub(entry, cache_dir), f"the Hub, {entry.repo_id}"
    if path is None:
        path, source = from_publisher(entry, cache_dir=cache_dir, url=url), link.url
    _logger.info("weights of %s: %s, from %s", entry.name, path, source)
    return path


def store(entry: Weights, checkpoint: str | PathLike[str], folder: Path, *, published: bool) -> Path:
    """Convert a checkpoint of an entry's architecture to `folder`; return the path of the weights there.

    published: whether it must be the entry's own checkpoint, as far as the number of classes tells.
    """
    num_classes, expected = load.num_classes_in(checkpoint), entry.dataset.num_classes
    if published and num_classes != expected:
        raise CheckpointError(
            f"{checkpoint} has {num_classes} classes, {entry.name} has {expected}: it is not the published checkpoint "
            "(tpn convert --output FOLDER keeps others)"
        )
    model = timm.create_model(entry.name, num_classes=num_classes)
    assert isinstance(model, TPNClassifier)
    load.load_checkpoint(model, checkpoint)
    return saved.save_pretrained(model, folder) / saved.WEIGHTS_FILE


@dataclass(frozen=True)
class _Link:
    """A publisher's file: where it is, its hash (None: behind a page for people), its folder in the cache."""

    url: str
    sha256: str | None
    folder: str
    from_table: bool


def _link_of(entry: Weights, url: str | None) -> _Link:
    if url is None:
        return _Link(entry.url, None if entry.manual else entry.sha256, entry.name, True)
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
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
    if entry.repo_id is None:
        return None
    repo = entry.repo_id + (f"@{entry.revision}" if entry.revision else "")
    try:
        path = hub_file(repo, saved.WEIGHTS_FILE, cache_dir=cache_dir or os.environ.get("TPN_CACHE"), prefer_cached=True)
        if entry.repo_id.startswith(f"{HUB_NAMESPACE}/"):  # otherwise the user chose whom to trust
            _check_converted(entry, path)
        return path
    except NoRepositoryError as error:
        _logger.debug("%s", error)
    except HubUnreachableError as error:
        if entry.manual:
            raise WeightsUnavailableError(f"{error}. {_by_hand(entry)}") from error
        if not constants.HF_HUB_OFFLINE:
            _logger.warning("%s. Turning to the publisher's own file, which holds the same weights: %s", error, entry.url)
    return None


def _check_converted(entry: Weights, path: Path) -> None:
    known = entry.converted_sha256
    if known is None:
        _logger.warning("%s from the Hub, %s: this version of tpn has no hash to compare it with", path, entry.repo_id)
    elif file_sha256(path) != known:
        raise WeightsUnavailableError(
            f"{path}, from {entry.repo_id} on the Hub, is not the file that this version of tpn knows: its SHA-256 is not {known}"
        )


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
    file = link.url.rpartition("/")[2]
    if constants.HF_HUB_OFFLINE:
        raise WeightsUnavailableError(
            f"The weights of {entry.name} are not in the cache ({folder}), and HF_HUB_OFFLINE forbids to fetch them; "
            f"unset it, or bring {file} here and run: {convert_command(entry)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of several processes that want the same weights, one fetches them.
        with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
            path = cached(folder)
            if path is None:
                for left_over in folder.glob(saved.INCOMPLETE + "*"):  # by a process that was killed
                    shutil.rmtree(left_over)
                download(link.url, folder / file, link.sha256)
                path = store(entry, folder / file, folder, published=link.from_table)
                (folder / file).unlink()
            return path
    except DownloadError as error:
        raise WeightsUnavailableError(
            f"could not download {link.url}: {error}. Try again later, or fetch the file by other means "
            f"and run: {convert_command(entry)}"
        ) from error
    except OSError as error:
        raise WeightsUnavailableError(f"could not keep {file} in {folder}: {error.strerror or error}; {ELSEWHERE}") from error
