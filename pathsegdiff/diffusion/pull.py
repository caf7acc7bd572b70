"""Get a published model: its files, and the bundle that they make."""

import fnmatch
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pathsegdiff.diffusion.bundle import (
    CARD_FILE,
    check_new_folder,
    has_encoder,
    load_bundle,
    models_dir,
)
from pathsegdiff.diffusion.checkpoints import HIPT_SHA256, import_bundle
from pathsegdiff.errors import BundleError, ConfigError, FetchError
from pathsegdiff.fetch.download import (
    DriveFile,
    Remote,
    Report,
    State,
    bytes_there,
    check_room,
    download,
    list_drive_folder,
    staging,
)
from pathsegdiff.fetch.licences import Terms


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a published model.

    Attributes:
        name: Of the file on this machine.
        role: Argument of ``import_bundle`` that takes it, or "".
        remote: Where it is; None for a file of a Drive folder.
        drive: (id of a Google Drive folder, pattern of a path in it). Of several that fit, the
            last by name is taken: they begin with the date of the run.
        kept_by: Name of the model that keeps this very file; one that is there is used.
    """

    name: str
    role: str = ""
    remote: Remote | None = None
    drive: tuple[str, str] | None = None
    kept_by: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A published model.

    Attributes:
        name: As in ``psd models pull NAME``; also of the bundle.
        title: One line for people.
        licence, citation, homepage: For people, who must agree to the licence.
        files: What it consists of.
        bundle: Whether the files become a bundle; else they are kept as they are.
        note: What to say about files that are kept, or about a bundle without an encoder.
        ema: Whether the authors compute with the averaged weights.
        encoder_config: Shape of the encoder that ``--encoder`` gives, which no command can fetch;
            "" for a model that brings its own.
    """

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    files: tuple[SourceFile, ...]
    bundle: bool
    note: str = ""
    ema: bool = False
    encoder_config: str = ""

    @property
    def terms(self) -> Terms:
        """Licence and citation, for the user to accept."""
        return Terms(
            name=self.name,
            text="\n".join(
                (
                    f"{self.name}: {self.title}",
                    f"licence: {self.licence}",
                    f"citation: {self.citation}",
                    f"home page: {self.homepage}",
                )
            ),
        )


_HIPT_LICENCE = "Apache 2.0 with Commons Clause, non-commercial (HIPT)"
_HIPT_CITATION = (
    "Chen RJ, Chen C, Li Y, et al. Scaling vision transformers to gigapixel images via "
    "hierarchical self-supervised learning. CVPR 2022."
)
_HIPT_FILE = SourceFile(
    name="vit256_small_dino.pth",
    role="encoder",
    # git LFS: this address leads on to the content
    remote=Remote(
        url="https://github.com/mahmoodlab/HIPT/raw/master/HIPT_4K/Checkpoints/vit256_small_dino.pth",
        sha256=HIPT_SHA256,
        size=704_238_867,
    ),
    kept_by="hipt",
)
_SSL_LDM_FOLDER = "1kZ69wVEHV3k3Zr1hgS3kftz9cfNb9BxA"
_ZOOM_LDM = "https://huggingface.co/StonyBrook-CVLab/ZoomLDM/resolve/main/brca"

#: What ``psd models pull`` knows.
SOURCES = (
    ModelSource(
        name="ssl-ldm-brca",
        title="SSL-guided latent diffusion model of TCGA-BRCA at 20x, with HIPT's patch encoder",
        licence=f"no licence file published (SSL-guided LDM); {_HIPT_LICENCE}",
        citation="Graikos A, Yellapragada S, Le MQ, et al. Learned representation-guided diffusion "
        f"models for large-image generation. CVPR 2024. {_HIPT_CITATION}",
        homepage=f"https://drive.google.com/drive/folders/{_SSL_LDM_FOLDER} and "
        "https://github.com/mahmoodlab/HIPT",
        files=(
            SourceFile(
                name="project.yaml",
                role="project",
                drive=(_SSL_LDM_FOLDER, "configs/*-project.yaml"),
            ),
            SourceFile(
                name="last.ckpt", role="ldm", drive=(_SSL_LDM_FOLDER, "checkpoints/last.ckpt")
            ),
            _HIPT_FILE,
        ),
        bundle=True,
    ),
    ModelSource(
        name="hipt",
        title="HIPT's patch encoder (ViT-S/16 on 256 px, DINO on TCGA), as the published file",
        licence=_HIPT_LICENCE,
        citation=_HIPT_CITATION,
        homepage="https://github.com/mahmoodlab/HIPT",
        files=(_HIPT_FILE,),
        bundle=False,
        note="for `psd models import --encoder`",
    ),
    ModelSource(
        name="zoomldm-brca",
        title="ZoomLDM of TCGA-BRCA, conditioned on UNI's embeddings and the magnification",
        licence="MIT (ZoomLDM); UNI has terms of its own (CC BY-NC-ND 4.0)",
        citation="Yellapragada S, Graikos A, Triaridis K, et al. ZoomLDM: latent diffusion model "
        "for multi-scale image generation. CVPR 2025.",
        homepage="https://huggingface.co/StonyBrook-CVLab/ZoomLDM",
        files=(
            SourceFile(
                name="config.yaml", role="project", remote=Remote(url=f"{_ZOOM_LDM}/config.yaml")
            ),
            SourceFile(
                name="weights.ckpt", role="ldm", remote=Remote(url=f"{_ZOOM_LDM}/weights.ckpt")
            ),
        ),
        bundle=True,
        ema=True,
        encoder_config="uni",
        note="it has no patch encoder, so `psd extract` needs --cond none. UNI, the encoder that "
        "it was trained with, is given on request at https://huggingface.co/MahmoodLab/UNI; pull "
        "again into another --out with --encoder pytorch_model.bin",
    ),
)


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What would be got.

    Attributes:
        out: Folder of the bundle, or of the files that are kept.
        done: Whether a whole bundle is there already.
        encoder: Checkpoint that the user has, or None.
    """

    source: ModelSource
    out: Path
    done: bool
    encoder: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of models: accepted licences and what is on its way lie in it."""
        return self.out.absolute().parent


def find_source(name: str, sources: Iterable[ModelSource] | None = None) -> ModelSource:
    """A published model by its name.

    Raises:
        ConfigError: If none is called so.
    """
    known = {source.name: source for source in (SOURCES if sources is None else sources)}
    if name not in known:
        raise ConfigError(
            f"no published model is called {name!r}; there are {', '.join(known)} "
            "(`psd models import` takes files of your own)"
        )
    return known[name]


def plan_pull(
    source: ModelSource, out: Path | None = None, encoder: Path | None = None
) -> PullPlan:
    """Look whether a model is there.

    Args:
        out: Folder to make; None for a named one in ``models_dir()``.
        encoder: Checkpoint of a patch encoder that is got by hand, or None.

    Raises:
        BundleError: If something else stands there, or the same model without the encoder.
        ConfigError: If the model needs no such encoder.
        FetchError: If the encoder's file is not there.
    """
    if encoder is not None and not source.encoder_config:
        raise ConfigError(f"{source.name} takes no --encoder: leave it out")
    if encoder is not None and not encoder.is_file():
        raise FetchError(f"--encoder {encoder} is no file")
    folder = models_dir() / source.name if out is None else out
    if not source.bundle:
        return PullPlan(source=source, out=folder, done=False)
    try:
        check_new_folder(folder)
    except BundleError:
        kept = [file.name for file in source.files if (folder / file.name).exists()]
        if kept and not (folder / CARD_FILE).exists():
            raise BundleError(
                f"{folder} holds {', '.join(kept)} and no bundle: remove it, or make a bundle of "
                "these files elsewhere with `psd models import`"
            ) from None
        bundle = load_bundle(folder.absolute())
        if encoder is not None and not has_encoder(bundle.path):
            raise BundleError(
                f"{folder} is {source.name} without an encoder; remove it or choose another --out"
            ) from None
        return PullPlan(source=source, out=folder, done=True, encoder=encoder)
    return PullPlan(source=source, out=folder, done=False, encoder=encoder)


def pull_model(plan: PullPlan, report: Report) -> list[str]:
    """Get the files of a model and make the bundle; an interrupted call is continued by the next.

    Returns:
        What happened, a line each.

    Raises:
        FetchError: If a file cannot be got.
        BundleError: If the files make no bundle; they are then kept.
    """
    source = plan.source
    if plan.done:
        return [f"{source.name}: already there, in {plan.out}"]
    with staging(plan.root) as shared:
        folder = shared / source.name if source.bundle else plan.out
        lines, files = _get_files(plan, folder, report)
        if not source.bundle:
            note = f"; {source.note}" if source.note else ""
            return [*lines, f"{source.name}: {len(source.files)} files in {plan.out}{note}"]
        try:
            if source.encoder_config:
                files["encoder"] = plan.encoder
            if plan.encoder is not None:
                files["encoder_config"] = Path(source.encoder_config)
            result = import_bundle(
                **files,  # type: ignore[arg-type]  # paths, by the names of the arguments
                out=plan.out,
                ema=source.ema,
                name=source.name,
                title=source.title,
                licence=source.licence,
            )
        except BundleError as error:
            raise BundleError(f"{error} (the files are kept in {folder})") from None
        # the bundle holds all of it, and the card their hashes
        shutil.rmtree(folder, ignore_errors=True)
    bundle = result.bundle
    lines.append(f"{bundle.card.name}: imported, {result.tensors} tensors, into {bundle.path}")
    if not has_encoder(bundle.path):
        lines.append(f"{source.name}: {source.note}")
    return lines


def _get_files(
    plan: PullPlan, folder: Path, report: Report
) -> tuple[list[str], dict[str, Path | None]]:
    lines: list[str] = []
    paths: dict[str, Path | None] = {}
    listings: dict[str, list[DriveFile]] = {}
    _check_room(plan, folder)
    for file in plan.source.files:
        path = folder / file.name

        def on_bytes(done: int, total: int | None, name: str = file.name) -> None:
            report(State(label=name, unit="bytes", done=done, total=total))

        kept = plan.root / file.kept_by / file.name
        if file.kept_by not in ("", plan.source.name) and kept.is_file() and file.remote:
            download(file.remote, kept)  # is there: only its hash is looked at
            path, new, where = kept, False, ""
        elif path.exists() and file.remote is None:
            new, where = False, ""
        else:
            remote, where = _locate(file, listings)
            new = download(remote, path, on_bytes=on_bytes)
        origin = f" ({where})" if where else ""
        lines.append(f"{file.name}{origin}: {'whole' if new else 'already there'}")
        if file.role:
            paths[file.role] = path
    return lines, paths


def _check_room(plan: PullPlan, folder: Path) -> None:
    """All files of a known size together, before the first of them is asked for."""
    sizes = [
        file.remote.size - bytes_there(folder / file.name)
        for file in plan.source.files
        if file.remote is not None and file.remote.size is not None
        if not (folder / file.name).exists()
        and not (file.kept_by and (plan.root / file.kept_by / file.name).exists())
    ]
    if sizes:
        check_room(folder, sum(sizes), "make room, or choose another --out")


def _locate(file: SourceFile, listings: dict[str, list[DriveFile]]) -> tuple[Remote, str]:
    """Address of a file, and its path in the Drive folder."""
    if file.remote is not None:
        return file.remote, ""
    assert file.drive is not None  # one of the two says where it is
    folder, pattern = file.drive
    if folder not in listings:
        listings[folder] = list_drive_folder(folder)
    fitting = sorted(
        (one for one in listings[folder] if fnmatch.fnmatchcase(f"/{one.path}", f"*/{pattern}")),
        key=lambda one: one.path,
    )
    if not fitting:
        raise FetchError(
            f"Google Drive folder {folder} holds no {pattern}; it has been changed: get the files "
            "by hand and use `psd models import`"
        )
    return Remote(url=fitting[-1].url), fitting[-1].path
