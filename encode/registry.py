"""The model registry: MLflow runs, versions and aliases. Only this module and `encode.serving` import mlflow.

Aliases of a registered model: `candidate` is the newest that was trained, `champion` the one that serves.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from encode import __version__
from encode.config import Config, Places, RegistryConfig
from encode.errors import ArtifactError, ConfigError
from encode.model.files import MODEL_FILES, ModelCard, model_digest, read_report
from encode.outputs import git_commit
from encode.schema import digest, fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import ActiveRun, MlflowClient

CHAMPION = "champion"
CANDIDATE = "candidate"

PREVIOUS = "encode.previous_champion"
"""Tag: the version that served before this one."""
RELEASED = "encode.released"
"""Tag: the bundle with which this version first served."""
REFUSED = "encode.refused"
"""Tag: why this version must not serve."""
REPORT = "release/report.html"
"""Artifact of a version's run: why it may serve or not."""

# Set before MLflow is imported. Its log would warn that the input example cannot be scored when it is logged, which is
# so by design: the space gets its first snapshot after training. A server that is gone is asked for a quarter of a
# minute, not for the four minutes of MLflow, in which a command says nothing and serving does not say what is wrong.
_DEFAULTS = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    number: str
    space: str
    model: str
    """Digest of the model's files."""
    tags: Mapping[str, str]

    @property
    def was_champion(self) -> bool:
        """Tell whether it is or was the one that serves."""
        return bool({RELEASED, PREVIOUS} & set(self.tags))


class Registry:
    """The versions of one registered model in one MLflow."""

    def __init__(self, places: Places, config: RegistryConfig) -> None:
        """Connect; MLflow is imported here, which takes seconds.

        Raises:
            ConfigError: no tracking URI is known.
        """
        if not places.tracking_uri:
            raise ConfigError("MLFLOW_TRACKING_URI is not set; expected the address of an MLflow server")
        self._places, self._config, self._uri = places, config, places.tracking_uri
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow
        if self._uri.startswith("sqlite:///"):
            Path(self._uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        self._client: MlflowClient = mlflow.MlflowClient(self._uri, self._uri)

    def by_alias(self, alias: str) -> Version | None:
        """Return the version that an alias names, or None."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version_by_alias(self._config.model_name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return _version(found)

    def by_number(self, number: str) -> Version:
        """Return a version.

        Raises:
            ArtifactError: there is none of that number.
        """
        from mlflow.exceptions import MlflowException

        where = f"{self._config.model_name} version {number}"
        if not re.fullmatch(r"[0-9]{1,9}", number):  # MLflow takes 32 bits
            raise ArtifactError(f"{where}: expected a number, as MLflow shows it with the model")
        try:
            return _version(self._client.get_model_version(self._config.model_name, number))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise ArtifactError(f"{where}: not in the registry") from None
            raise

    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""
        found = self._client.search_model_versions(f"name = '{self._config.model_name}'")
        return sorted(map(_version, found), key=lambda version: int(version.number))

    def point(self, alias: str, version: Version) -> None:
        """Move an alias."""
        self._client.set_registered_model_alias(self._config.model_name, alias, version.number)

    def tag(self, version: Version, name: str, value: str) -> None:
        """Write a note on a version."""
        self._client.set_model_version_tag(self._config.model_name, version.number, name, value)

    def untag(self, version: Version, name: str) -> None:
        """Remove a note from a version, if it is there."""
        if name in version.tags:
            self._client.delete_model_version_tag(self._config.model_name, version.number, name)

    def released(self) -> list[str]:
        """Return the numbers of the versions that are or were champion, ascending."""
        return [one.number for one in self.versions() if one.was_champion]

    def spaces_in_use(self) -> list[str]:
        """Return the spaces of champion and candidate, in which interests are refreshed."""
        return sorted({version.space for version in self._in_use()})

    def spaces_at_hand(self) -> list[str]:
        """Return the spaces of all versions with an alias, and of those that a champion may be rolled back to at once.

        That is, of the champion before the champion. Empty where nothing is registered yet.
        """
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(self._config.model_name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        named = [self.by_number(str(number)) for number in set(aliases.values())]
        before = {one.tags[PREVIOUS] for one in named if PREVIOUS in one.tags}
        return sorted({version.space for version in (*named, *map(self.by_number, before))})

    def notify(self, url: str, secret: str) -> str:
        """Let MLflow call an address whenever an alias of this registry is set or removed; the same address once.

        Returns:
            Id of the webhook in MLflow.

        Raises:
            ConfigError: MLflow takes no such address, or keeps no webhooks.
        """
        from mlflow.entities.webhook import WebhookEvent, WebhookStatus
        from mlflow.exceptions import MlflowException

        events = [WebhookEvent("model_version_alias", action) for action in ("created", "deleted")]
        try:
            known = next((one for one in self._webhooks() if one.url == url), None)
            told: dict[str, Any] = {
                "name": f"encode-{digest(url.encode())[:12]}",
                "events": events,
                "secret": secret,
                "status": WebhookStatus.ACTIVE,
            }
            if known is None:
                return str(self._client.create_webhook(url=url, **told).webhook_id)
            return str(self._client.update_webhook(known.webhook_id, **told).webhook_id)
        except (MlflowException, NotImplementedError) as error:
            raise ConfigError(f"{self._uri}: no webhook for {url}: {error}") from None

    def _webhooks(self) -> Iterator[Any]:
        page = self._client.list_webhooks()
        yield from page
        while page.token:
            page = self._client.list_webhooks(page_token=page.token)
            yield from page

    def metrics(self, version: Version) -> dict[str, float]:
        """Return the metrics that were logged with a version."""
        return dict(self._client.get_run(version.tags["encode.run"]).data.metrics)

    def settings(self, version: Version) -> dict[str, str]:
        """Return the settings that a version was trained with, as they were logged."""
        return dict(self._client.get_run(version.tags["encode.run"]).data.params)

    def log_report(self, version: Version, html: str) -> str:
        """Keep a report with a version's run, in place of an earlier one, and return its address."""
        run = version.tags["encode.run"]
        self._client.log_text(run, html, REPORT)
        links = self.links(version)
        if "run" in links:
            return f"{links['run']}/artifacts/{REPORT}"
        return f"{self._client.get_run(run).info.artifact_uri}/{REPORT}"

    def links(self, version: Version) -> dict[str, str]:
        """Return the addresses of a version and its run in MLflow's pages; none where no server has them."""
        if not self._uri.startswith(("http://", "https://")):
            return {}
        run = self._client.get_run(version.tags["encode.run"]).info
        pages = f"{re.sub('//[^/]*@', '//', self._uri).rstrip('/')}/#"  # a report shows no password
        return {
            "run": f"{pages}/experiments/{run.experiment_id}/runs/{run.run_id}",
            "model version": f"{pages}/models/{quote(self._config.model_name, safe='')}/versions/{version.number}",
        }

    def files(self, version: Version) -> dict[str, bytes]:
        """Fetch the files of a version's model; nothing in them is executed.

        Raises:
            ArtifactError: one is missing, or they are not the ones that were registered.
        """
        import mlflow

        where = f"{self._config.model_name} version {version.number}"
        with tempfile.TemporaryDirectory() as folder:
            root = Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"models:/{self._config.model_name}/{version.number}", dst_path=folder
                )
            )
            try:
                files = {name: (root / "artifacts" / "model" / name).read_bytes() for name in MODEL_FILES}
            except FileNotFoundError as error:
                raise ArtifactError(
                    f"{where}: {Path(error.filename).name} is missing; train it again, or put its folder back if "
                    "moved: MLflow keeps the path of every file"
                ) from None
        if model_digest(files) != version.model:
            raise ArtifactError(
                f"{where}: damaged: digest {model_digest(files)[:12]}, registered as {version.model[:12]}"
            )
        return files

    def register(
        self,
        config: Config,
        card: ModelCard,
        files: Mapping[str, bytes],
        inputs: Mapping[str, str],
        prefix: str,
        started: float | None = None,
    ) -> Version:
        """Log a trained model as a run with a candidate version; a model that is registered already is found again.

        It does not become candidate again where a newer one is, or serves: that may have learned from its test days.

        Args:
            config: logged as parameters.
            card: its space, days and metrics.
            files: of the model.
            inputs: digest of each behaviors partition it was trained on, logged as a dataset.
            prefix: where the files are in the store.
            started: when the work began that the run records, UTC seconds; None where that is the registration alone.
        """
        import mlflow
        from mlflow.tracking.context.registry import resolve_tags

        wanted = model_digest(files)
        if existing := self._find(wanted):
            newest = max((int(one.number) for one in self._in_use()), default=0)
            if REFUSED not in existing.tags and int(existing.number) > newest:
                self.point(CANDIDATE, existing)
            return existing
        experiment = self._experiment()
        mlflow.set_experiment(experiment_id=experiment)  # a run of another than the one set cannot be gone on with
        report = read_report(files)
        name = f"{config.name} as of {card.as_of}"
        # mlflow.start_run would let the run begin now, when the training that it is about is over.
        at = None if started is None else int(started * 1000)
        made = self._client.create_run(experiment, start_time=at, tags=resolve_tags(), run_name=name)
        with warnings.catch_warnings(), self._resumed(made.info.run_id) as run:
            warnings.simplefilter("ignore")
            mlflow.log_params(_flat(config.model_dump(mode="json", include={"model", "clustering", "training"})))
            mlflow.log_metrics({name: value for name, value in card.metrics.items() if value == value})
            for epoch, measured in enumerate(report["epochs"]):  # type: ignore[arg-type,var-annotated]
                mlflow.log_metrics({f"epoch_{name}": value for name, value in measured.items()}, step=epoch + 1)
            self._log_dataset(card, inputs)
            mlflow.log_dict({one: self._docs_of(one) for one in sorted(inputs)}, "data_docs.json")
            mlflow.set_tags(
                {
                    "encode.preset": config.name,
                    "encode.model": wanted,
                    "encode.space": card.space,
                    "encode.files": f"{self._places.store}/{prefix}",
                    "encode.data_docs": f"{self._docs_of('behaviors/dt=DAY')}, days {_days(card)}; `encode docs DAY` "
                    "fetches one",
                    "encode.git_commit": git_commit(),
                    "encode.version": __version__,
                }
            )
            mlflow.log_figure(plot_report(report), "report.png")
            number = self._log_model(files)
        for name, value in {
            "encode.space": card.space,
            "encode.as_of": str(card.as_of),
            "encode.run": run.info.run_id,
            "encode.git_commit": git_commit(),
            "encode.model": wanted,  # last: by it a version is found again, so it must be whole
        }.items():
            self._client.set_model_version_tag(self._config.model_name, number, name, value)
        version = self.by_number(number)
        self.point(CANDIDATE, version)
        return version

    def _resumed(self, run_id: str) -> ActiveRun:
        """Let MLflow's functions log into a run that was just made; should that fail, it is no run for ever."""
        import mlflow

        try:
            return mlflow.start_run(run_id)
        except BaseException:
            self._client.set_terminated(run_id, "FAILED")
            raise

    def _in_use(self) -> list[Version]:
        return [version for alias in (CHAMPION, CANDIDATE) if (version := self.by_alias(alias))]

    def _find(self, model: str) -> Version | None:
        query = f"name = '{self._config.model_name}' and tags.`encode.model` = '{model}'"
        found = [_version(one) for one in self._client.search_model_versions(query)]
        return max(found, key=lambda version: int(version.number), default=None)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._config.experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (Path(self._uri.removeprefix("sqlite:///")).parent / "artifacts").as_uri()
        return str(self._client.create_experiment(self._config.experiment, artifact_location=location))

    def _docs_of(self, partition: str) -> str:
        """Return where the Data Docs of a partition of behaviors are."""
        return f"{self._places.store}/{partition.replace('behaviors/', 'quarantine/', 1)}/index.html"

    def _log_dataset(self, card: ModelCard, inputs: Mapping[str, str]) -> None:
        import mlflow
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset

        source = resolve_dataset_source(f"{self._places.store}/behaviors")
        name = f"behaviors {_days(card)}"
        mlflow.log_input(MetaDataset(source, name=name, digest=fingerprint(dict(inputs))[:36]), context="training")

    def _log_model(self, files: Mapping[str, bytes]) -> str:
        import mlflow
        import pandas as pd
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        signature = ModelSignature(
            inputs=Schema([ColSpec("long", "user_id"), ColSpec("long", "item_id")]),
            outputs=Schema([ColSpec("double", "probability")]),
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            for name in MODEL_FILES:
                (folder / name).write_bytes(files[name])
            logged = mlflow.pyfunc.log_model(
                name="ctr",
                python_model=str(model_code()),
                artifacts={"model": str(folder)},
                model_config={"store": self._places.store, "endpoint_url": self._places.endpoint_url},
                signature=signature,
                input_example=pd.DataFrame({"user_id": [1, 1], "item_id": [1, 2]}),
                pip_requirements=[f"encode-interests=={__version__}"],
                registered_model_name=self._config.model_name,
            )
        return str(logged.registered_model_version)


def model_code() -> Path:
    """Return the file that MLflow runs to make the pyfunc: from the checkout, else where the wheel put it.

    Raises:
        ConfigError: it is in neither place.
    """
    places = [
        Path(__file__).parents[1] / "mlflow" / "ctr_model.py",
        Path(sys.prefix) / "share" / "encode" / "mlflow" / "ctr_model.py",
    ]
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(f"mlflow/ctr_model.py: not found; looked at {' and '.join(map(str, places))}")


def plot_report(report: Mapping[str, Any]) -> Figure:
    """Draw reliability and AUC by history length side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = report["reliability"]
    top = 1.05 * max(max(one["predicted"], one["observed"]) for one in bins)
    left.plot([0, top], [0, top], color="0.7", linewidth=1, label="perfect")
    left.plot([one["predicted"] for one in bins], [one["observed"] for one in bins], "o-", label="test days")
    left.set(xlabel="predicted probability (mean of a tenth)", ylabel="observed share", title="Reliability")
    left.legend()
    lengths = report["auc_by_history_length"]
    right.plot([one["up_to"] for one in lengths], [one["auc"] for one in lengths], "o-")
    right.set(xlabel="behaviors in the history (upper end of a tenth)", ylabel="AUC", title="AUC by history length")
    right.set_xscale("symlog")
    shown = [one["up_to"] for one in lengths]
    right.set_xticks(shown[::3], [f"{one:,}" for one in shown[::3]])
    right.set_xticks([], minor=True)
    return figure


def _days(card: ModelCard) -> str:
    return f"{card.first_day} to {card.as_of - timedelta(days=1)}"


def _version(found: Any) -> Version:
    tags = dict(found.tags)
    return Version(str(found.version), tags.get("encode.space", ""), tags.get("encode.model", ""), tags)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
