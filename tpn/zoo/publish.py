"""Upload models to the Hugging Face Hub: your own, or every published checkpoint under a namespace."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from torch import nn

from tpn import hub
from tpn.config import ModelConfig
from tpn.errors import CheckpointError, UploadError, WeightsUnavailableError
from tpn.files import StrPath, file_sha256
from tpn.zoo import checkpoints, fetch
from tpn.zoo.checkpoints import Checkpoint, Embedded, HubFiles, Page
from tpn.zoo.names import CONFIG_FILE, WEIGHTS_FILE, convert_command, weights_folder
from tpn.zoo.saved import read_config, save_pretrained

CARD_FILE = "README.md"
_CARD = """---
{header}
---

# {name}

A video classifier. {origin}

| | |
|---|---|
{table}

## Use

```python
import tpn

model = tpn.create_model("hf-hub:{repo_id}"{modules}).eval(){classify}
```

The model takes normalized clips (B, {channels}, {frames}, H, W); `tpn.input_spec(model)` describes sampling and
normalization. `timm.create_model("hf-hub:{repo_id}", pretrained=True)` works too, after `import tpn`.

## Citation

```bibtex
@inproceedings{{yang2020tpn,
  title={{Temporal Pyramid Network for Action Recognition}},
  author={{Yang, Ceyuan and Xu, Yinghao and Shi, Jianping and Dai, Bo and Zhou, Bolei}},
  booktitle={{CVPR}},
  year={{2020}}
}}
```
"""
_CLASSIFY = """
classify = tpn.VideoClassifier(model)  # sampling, transform and class names come with the weights
print(classify("video.mp4").top(5))"""


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Add model",
    license: str | None = None,
) -> str:
    """Upload a model in one commit: weights, configuration, and a model card if the repository has none.

    `create_model("hf-hub:owner/name")`, of tpn and of timm, loads it.

    Args:
        repo_id: "owner/name", or "name" under your own account; created if necessary.
        private: whether a new repository is private.
        token: Default: $HF_TOKEN, or that of `hf auth login`.
        license: for the card, such as "apache-2.0".

    Returns the address of the repository. Raises UploadError; see `save_pretrained` for other errors.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, temporary)
        api = HfApi(token=token, library_name="tpn")
        return _upload(api, folder, repo_id, private, commit_message, license=license)


class Publication(NamedTuple):
    """The result of `publish` for one checkpoint.

    Attributes:
        repo_id: its repository, "namespace/model.tag".
        state: "published" or "to publish", with the SHA-256 of the weights file in `detail`; "to fetch and publish"; "not here",
            with the way to get it; or "failed", with the reason.
    """

    repo_id: str
    state: str
    detail: str


def publish(
    namespace: str,
    *,
    dry_run: bool = False,
    private: bool = False,
    cache_dir: StrPath | None = None,
    token: str | None = None,
) -> Iterator[Publication]:
    """Upload every checkpoint of the table that is in the cache or has a direct link, to `{namespace}/{model}.{tag}`.

    They are downloaded and converted first if necessary. Yields one Publication per checkpoint, when it is done.

    Args:
        dry_run: report what would be done; nothing is downloaded, written or sent.
        private: whether new repositories are private.
        cache_dir: as in `create_model`.
        token: as in `push_to_hub`.
    """
    api = HfApi(token=token, library_name="tpn")
    for entry in checkpoints.CHECKPOINTS.values():
        if isinstance(entry.source, Embedded | HubFiles):
            continue
        repo_id, folder = f"{namespace}/{entry.name}", weights_folder(entry, cache_dir)
        try:
            path = fetch.cached(folder)
            if path is None and isinstance(entry.source, Page):
                yield Publication(repo_id, "not here", f"download {entry.source.url}, then: {convert_command(entry)}")
            elif path is None and dry_run:
                yield Publication(repo_id, "to fetch and publish", "")
            else:
                path = path or fetch.from_source(entry, entry.source, folder, cache_dir)
                if not dry_run:
                    _upload(api, path.parent, repo_id, private, f"Add {entry.name}", entry=entry)
                yield Publication(repo_id, "to publish" if dry_run else "published", file_sha256(path))
        except (WeightsUnavailableError, CheckpointError, UploadError) as error:
            yield Publication(repo_id, "failed", str(error))


def model_card(config: ModelConfig, repo_id: str, *, entry: Checkpoint | None = None, license: str | None = None) -> str:
    """Return the README.md of a repository with a published checkpoint, `entry`, or with another model and its license."""
    spec = config.input_spec
    data = ModelCardData(
        license=entry.license if entry else license,
        library_name="tpn",
        pipeline_tag="video-classification",
        tags=["video-classification", "action-recognition", "temporal-pyramid-network"],
    )
    frames = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
    facts = {"model": f"`{config.architecture}`", "frames": frames, "classes": config.num_classes}
    parts = {"backbone": config.backbone} | ({"neck": config.neck} if config.neck else {})
    if entry:
        facts |= {
            "data": entry.dataset,
            "protocol": entry.protocol,
            "accuracy, reported upstream": _accuracy(entry.reported_top1, entry.reported_top5),
            "accuracy, measured by tpn": _accuracy(entry.measured_top1, entry.measured_top5),
            "initialized from": entry.initialized_from,
            "license": entry.license,
            "note": entry.note,
        }
        origin = f"The weights come from {entry.publisher} ({entry.source.url}); the tensors are renamed and otherwise unchanged."
    else:
        facts |= {kind: f"`{part.name}` {dict(part.args)}" for kind, part in parts.items()}
        facts["temperature"] = "" if config.head.temperature == 1 else f"{config.head.temperature:.3g}"
        origin = "Trained with tpn, an implementation of the [Temporal Pyramid Network](https://arxiv.org/abs/2004.03548)."
    return _CARD.format(
        header=data.to_yaml(),
        name=repo_id.rpartition("/")[2],
        origin=origin,
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items() if value != ""),
        repo_id=repo_id,
        modules="".join(f", {kind}=MODULE" for kind, part in parts.items() if part.is_module),
        classify=_CLASSIFY if spec.in_chans == 3 else "",
        channels=spec.in_chans,
        frames=spec.num_frames,
    )


def _accuracy(top1: float | None, top5: float | None) -> str:
    return ", ".join(f"top-{k} {value:.2f} %" for k, value in ((1, top1), (5, top5)) if value is not None) or "not measured"


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool, message: str, **about: Any) -> str:
    """Upload weights, configuration and card in one commit: a repository never has one without the others.

    `about` is the `entry` or the `license` of `model_card`.
    """
    try:
        operations = [CommitOperationAdd(name, folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if about.get("entry") or not api.file_exists(repo_id, CARD_FILE):
            card = model_card(read_config(folder), repo_id, **about)
            operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
        api.create_commit(repo_id, operations, commit_message=message)
    except Exception as error:  # of the HTTP library of this version of the client
        raise UploadError(f"cannot upload to {repo_id} on the Hub ({api.endpoint}): {hub.reason(error)}") from error
    return f"{api.endpoint}/{repo_id}"
