"""Put models on the Hugging Face Hub: one of one's own, or every published checkpoint under a namespace."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from torch import nn

from tpn.video.spec import InputSpec
from tpn.zoo import saved, sources
from tpn.zoo.convert import CheckpointError
from tpn.zoo.download import file_sha256
from tpn.zoo.hub import UploadError, WeightsUnavailableError, uploading
from tpn.zoo.weights import WEIGHTS, Weights

CARD_FILE = "README.md"
CITATION = """@inproceedings{yang2020tpn,
  title={Temporal Pyramid Network for Action Recognition},
  author={Yang, Ceyuan and Xu, Yinghao and Shi, Jianping and Dai, Bo and Zhou, Bolei},
  booktitle={CVPR},
  year={2020}
}"""


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

    `create_model("hf-hub:owner/name")`, of tpn and of timm, reads it back.

    Args:
        repo_id: "owner/name", or "name" under your own account; created if need be.
        private: whether a new repository is private.
        token: Default: $HF_TOKEN, or that of `hf auth login`.
        license: for the card, such as "apache-2.0".

    Returns the address of the repository. Raises UploadError.
    """
    api = HfApi(token=token, library_name="tpn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = saved.save_pretrained(model, temporary)
        with uploading(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            card = None
            if not api.file_exists(repo_id, CARD_FILE):
                card = model_card(saved.read_config(folder), repo_id, license=license)
            _commit(api, repo_id, folder, card, commit_message)
    return f"{api.endpoint}/{repo_id}"


@dataclass(frozen=True)
class Publication:
    """What `publish` did, or would do, with one checkpoint.

    state: "published" or "to publish", with the SHA-256 of the weights file in `detail`; "to fetch and publish"; "not
    here", with the way to get it, or "failed", with the reason.
    """

    entry: Weights
    repo_id: str
    state: str
    detail: str


def publish(
    namespace: str,
    *,
    dry_run: bool = False,
    private: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    token: str | None = None,
) -> Iterator[Publication]:
    """Upload every checkpoint of the table that is in the cache or has a direct link, to `{namespace}/{model}.{tag}`.

    Fetched and converted first where need be. Yields one Publication per checkpoint, when it is done.

    Args:
        dry_run: only say what would be done; nothing is fetched, written or sent.
        private: whether new repositories are private.
        cache_dir, token: as in `create_model` and `push_to_hub`.
    """
    for entry in WEIGHTS.values():
        if entry.embedded is not None:
            continue
        repo_id = f"{namespace}/{entry.name}"
        try:
            path = sources.cached(sources.cache_folder(entry, cache_dir))
            if path is None and entry.manual:
                state, detail = "not here", f"fetch {entry.url}, then: {sources.convert_command(entry)}"
            elif path is None and dry_run:
                state, detail = "to fetch and publish", ""
            else:
                path = path or sources.from_publisher(entry, cache_dir=cache_dir)
                if not dry_run:
                    _publish_one(entry, repo_id, path, private, token)
                state, detail = "to publish" if dry_run else "published", file_sha256(path)
        except (WeightsUnavailableError, CheckpointError, UploadError) as error:
            state, detail = "failed", str(error)
        yield Publication(entry, repo_id, state, detail)


def model_card(config: dict[str, Any], repo_id: str, *, entry: Weights | None = None, license: str | None = None) -> ModelCard:
    """Return the README.md of a repository.

    Args:
        config: the model's config.json.
        entry: the published checkpoint that the model is, if it is one.
        license: of the weights, if it is not.
    """
    spec, name = InputSpec.from_dict(config["input_spec"]), repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=entry.license if entry else license,
        library_name="tpn",
        pipeline_tag="video-classification",
        tags=["video-classification", "action-recognition", "temporal-pyramid-network"],
    )
    frames = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
    facts = {"architecture": f"`{config['architecture']}`", "frames": frames, "classes": str(config["num_classes"])}
    if entry is not None:
        facts |= table_row(entry)
    else:
        facts["model arguments"] = ", ".join(f"{k}={v!r}" for k, v in config["model_args"].items())
    table = "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    origin = (
        f"The weights are those of {entry.source} ({entry.url}), renamed tensor by tensor and otherwise unchanged."
        if entry
        else "Trained with tpn, an implementation of the [Temporal Pyramid Network](https://arxiv.org/abs/2004.03548)."
    )
    in_chans = len(spec.mean)
    classify = """
classify = tpn.VideoClassifier(model)  # sampling, transform and class names come with the weights
print(classify("video.mp4").top(5))"""
    text = f"""---
{data.to_yaml()}
---

# {name}

A video classifier. {origin}

{table}

## Use

```python
import tpn

model = tpn.create_model("hf-hub:{repo_id}").eval(){classify if in_chans == 3 else ""}
```

The model takes normalised clips (B, {in_chans}, {spec.num_frames}, H, W); `tpn.input_spec(model)` says how they are
sampled and normalised. `timm.create_model("hf-hub:{repo_id}", pretrained=True)` works too, after `import tpn`.

## Citation

```bibtex
{CITATION}
```
"""
    return ModelCard(text)


def table_row(entry: Weights) -> dict[str, str]:
    """Return what the table knows of a checkpoint, in words."""

    def accuracy(top1: float | None, top5: float | None) -> str:
        values = [f"top-1 {top1:.2f} %"] if top1 is not None else []
        return ", ".join(values + ([f"top-5 {top5:.2f} %"] if top5 is not None else [])) or "not yet"

    row = {
        "data": entry.dataset.title,
        "protocol": entry.protocol,
        "accuracy, reported upstream": accuracy(entry.reported_top1, entry.reported_top5),
        "accuracy, measured by tpn": accuracy(entry.measured_top1, entry.measured_top5),
        "initialised from": entry.initialised_from or "random",
        "license": entry.license,
    }
    return row | ({"note": entry.note} if entry.note else {})


def _publish_one(entry: Weights, repo_id: str, path: Path, private: bool, token: str | None) -> None:
    api = HfApi(token=token, library_name="tpn")
    with uploading(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        card = model_card(saved.read_config(path.parent), repo_id, entry=entry)
        _commit(api, repo_id, path.parent, card, f"Add {entry.name}")


def _commit(api: HfApi, repo_id: str, folder: Path, card: ModelCard | None, message: str) -> None:
    """Upload weights, configuration and card in one commit: a repository never holds one without the others."""
    files: dict[str, Path | bytes] = {name: folder / name for name in (saved.WEIGHTS_FILE, saved.CONFIG_FILE)}
    if card is not None:
        files[CARD_FILE] = str(card).encode()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(repo_id, operations, commit_message=message)
