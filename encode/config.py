"""The settings, in the order the data moves, and the one door by which they enter.

*What* is computed is a `Config`: defaults here, a YAML preset lists only what differs, unknown keys are refused.
*Where* it runs is `Places`, from the environment (or from an orchestrator's connections), never from a preset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from encode.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of settings: immutable, numbers finite, and a key that is not listed is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GeneratorConfig(Section):
    """A made-up log with planted interests: each user draws from few categories, lengths are lognormal."""

    num_users: Positive = 300
    num_items: Positive = 2_000
    num_categories: Positive = 40
    interests_per_user: Positive = 4
    median_length: Positive = 150
    length_sigma: Annotated[float, Field(ge=0)] = 0.8
    max_length: Positive = 100_000
    start: date = date(2024, 1, 1)
    num_days: Positive = 60
    noise: Share = 0.15
    seed: Seed = 0


class SourceConfig(Section):
    """The raw log: its format, where it lies, and how its columns are called."""

    reader: Literal["parquet", "taobao", "recbole", "movielens", "complete-journey", "generated"] = "parquet"
    path: Path | None = None
    """File or folder; not needed for `complete-journey` and `generated`, which bring their own."""
    columns: dict[Literal["user_id", "item_id", "category_id", "behavior", "timestamp"], str] = {}
    """Contract name -> column name in the file, where they differ. `category_id` and `behavior` may be absent."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    default_behavior: str = "view"
    """Behavior of every row where the log has no such column."""
    earliest: date = date(1990, 1, 1)
    latest: date = date(2100, 1, 1)
    """Rows at or after this day are rejected: their clock or their unit is wrong."""
    generator: GeneratorConfig = GeneratorConfig()


class TrendsConfig(Section):
    """How much a day may differ from those before it before that is said. It never refuses a day."""

    days: Positive = 28
    """Validated days that a day is compared with, the last before it."""
    min_days: Annotated[int, Field(ge=3)] = 7
    """With fewer of them there is no comparison."""
    width: Annotated[float, Field(gt=0)] = 5.0
    """Half the width of the usual band, in robust standard deviations (1.4826 x median absolute deviation)."""
    min_change: Annotated[float, Field(gt=0)] = 0.25
    """Relative change of a count or a share that is usual, however little it changed before."""
    min_share: Share = 0.005
    """Change of a share, of all rows, that is usual."""
    min_psi: Annotated[float, Field(ge=0)] = 0.1
    """Population stability index of hours or categories that is usual."""
    min_expected: Positive = 20
    """Rows that a category or a behavior would have today before its absence is said."""


class ValidationConfig(Section):
    """What a daily partition must be like."""

    behaviors: tuple[str, ...] | None = None
    """Allowed behavior names; None allows any that is not empty."""
    max_rejected_share: Share = 0.01
    """A day with a larger share of rejected rows is refused as a whole."""
    min_rows: Annotated[int, Field(ge=0)] = 1
    min_users: Annotated[int, Field(ge=0)] = 1
    reject_duplicates: bool = True
    """Reject a row that equals an earlier row of its day in all five columns."""
    trends: TrendsConfig = TrendsConfig()


class ModelConfig(Section):
    """The space and the CTR model. D, P and K are the symbols of the paper (d, m, K)."""

    embedding_dim: Positive = 64
    """D: width of a behavior embedding e, the item's and its category's part side by side."""
    category_dim: Positive = 16
    projected_dim: Positive = 16
    """P: width of h = W_h^T e, in which behaviors are compared, clustered and attended to."""
    reduction: Literal["learned", "random", "pca", "none", "table"] = "learned"
    """`random` keeps the random projection that `learned` starts from; `pca` takes the directions in which the
    embeddings of the moment vary most; `none` compares the embeddings themselves, projected_dim = embedding_dim;
    `table` learns the keys as tables of their own, so that attending and representing are apart."""
    selection: Literal["all", "semi-hard", "category"] = "all"
    """Triplets that teach the reduction: all that are drawn; those that hold in order but not by the margin yet; or
    those with one of the two others of the anchor's category, which is then the positive."""
    margin: Literal["dynamic", "fixed"] = "dynamic"
    margin_weight: Annotated[float, Field(ge=0)] = 0.5
    """lambda of the dynamic margin; the margin itself when it is fixed."""
    triplet_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the triplet loss beside the log loss."""
    center_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the center loss: how close the keys of a cluster are brought together, so that attention to centers is
    attention to behaviors."""
    pooling: Literal["mean", "relevance"] = "mean"
    """How a cluster's value is made of its behaviors' embeddings."""
    num_remembered: Annotated[int, Field(ge=0)] = 4096
    """Items of a user, the most frequent, that are kept by themselves beside the interests: what it takes to know again
    what a user had before. 6 bytes each."""
    size_prior: Annotated[float, Field(ge=0)] = 1.0
    """eta: weight of log n_k in the attention over interests; 1 is exact when a cluster's keys coincide."""
    initial_std: Annotated[float, Field(gt=0)] = 0.05
    """Standard deviation of embeddings before training; larger learns faster from little data, and overfits sooner."""
    initial_scale: Annotated[float, Field(gt=0)] = 8.0
    """Scale of the cosine in the relevance at the start; learned afterwards."""
    recent_length: Positive = 50
    """Behaviors that the recent branch attends to."""
    hidden_dims: tuple[Positive, ...] = (128, 64)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.category_dim >= self.embedding_dim:
            raise ValueError(f"category_dim {self.category_dim} must be below embedding_dim {self.embedding_dim}")
        if self.projected_dim > self.embedding_dim:
            raise ValueError(f"projected_dim {self.projected_dim} must not exceed embedding_dim {self.embedding_dim}")
        if self.reduction == "none" and self.projected_dim != self.embedding_dim:
            raise ValueError(
                f"reduction none: projected_dim {self.projected_dim} must equal embedding_dim {self.embedding_dim}"
            )
        return self


class ClusteringConfig(Section):
    """Spherical k-means over each user's history."""

    num_clusters: Annotated[int, Field(gt=0, le=255)] = 32
    """K: interests a user has at most."""
    num_iterations: Positive = 10
    seed: Seed = 0


class TrainingConfig(Section):
    """Splits by time, counted back from the end of the window, and the optimizer."""

    train_days: Positive = 56
    valid_days: Positive = 7
    test_days: Positive = 7
    snapshot_days: Positive = 7
    """Age that long-term interests reach before the next snapshot, in training and evaluation."""
    positive_behaviors: tuple[str, ...] | None = None
    """Behaviors that count as a click; None takes all. Histories always hold all."""
    num_negatives: Positive = 4
    """Negatives drawn for each positive."""
    negative_sampling: Literal["popularity", "uniform"] = "popularity"
    min_item_count: Positive = 5
    """Rarer items share one embedding per category."""
    unknown_share: Share = 0.01
    """Share of the training targets that are made unknown, to learn what a new item is worth."""
    max_positives: Positive = 150_000
    """Positives of the training split that are used at most, drawn at random."""
    max_eval_positives: Positive = 40_000
    num_epochs: Positive = 5
    patience: Positive = 1
    """Epochs without a better validation GAUC before training stops."""
    histories_per_batch: Positive = 64
    """Histories (one user as of one snapshot day) that one update pools, with all their impressions."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 4e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    num_threads: Annotated[int, Field(gt=0, le=1024)] = 2
    """Threads of an update. Another number gives other bytes: sums are taken in another order."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.snapshot_days > self.train_days:
            raise ValueError(
                f"snapshot_days {self.snapshot_days} must not exceed train_days {self.train_days}: the model would be "
                "trained with the interests of the first day alone; set it to how often interests will be refreshed"
            )
        return self


class RefreshConfig(Section):
    """How histories are grouped and interests are refreshed. Only `engine` and `memory_gb` never change a byte."""

    engine: Literal["local", "spark"] = "local"
    """Where the work runs; for `spark`, ENCODE_SPARK_MASTER says on which cluster."""
    kmeans: Literal["compiled", "torch", "torch-cuda"] = "compiled"
    """What clusters: the compiled kernel on the CPU, the fastest, or PyTorch on the CPU or on a GPU, to compare with.
    They round differently, so a behavior all but equally close to two centers may fall to the other one."""
    memory_gb: Annotated[float, Field(gt=0)] = 3.0
    """Memory that the local engine may use, GiB; less of it lets fewer buckets be worked on at a time."""
    rows_per_bucket: Annotated[int, Field(ge=1000)] = 2_000_000
    """Behaviors of a bucket on average, at most; the number of buckets follows from it, a power of two."""
    min_buckets: Positive = 8
    """A user's bucket, and so the file of a snapshot, is a hash of the user id."""
    max_deltas: Annotated[int, Field(ge=0)] = 8
    """Files of changes that a bucket may have on top of its base before they are folded into one. 0 rebuilds always."""
    max_delta_share: Share = 0.25
    """Size of those files relative to the base before they are folded."""
    max_drift: Annotated[float, Field(ge=0)] = 0.01
    """How much worse interests warmed up from their last centers may be than made anew (relative inertia, of a sample
    of the users that changed) before all are made anew."""


class ReleaseConfig(Section):
    """The gates before a model version serves. A limit that nothing misses switches one off: 0, or a maximum of 1e9."""

    min_auc: Share = 0.6
    min_gauc: Share = 0.55
    min_auc_first_time: Share = 0.55
    """AUC among items that the user never had before: repeats are easy where negatives are never from the past."""
    max_logloss: Annotated[float, Field(gt=0)] = 0.6
    calibration: tuple[float, float] = (0.8, 1.25)
    """Mean predicted over mean observed, lowest and highest allowed."""
    min_coverage: Share = 0.9
    """Share of the test window's users that the snapshot must hold."""
    max_parity: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference of a probability between serving and the replay that measures the model."""
    max_latency_ms: Annotated[float, Field(gt=0)] = 50.0
    """For 1,000 candidates of one user, median, on one thread."""
    max_size_mb: Annotated[float, Field(gt=0)] = 4096.0
    """Megabytes (10^6 bytes) of weights and space, which every serving process holds in memory."""
    max_auc_loss: Share = 0.002
    """AUC that a candidate may lose to the champion; this and what follows are measured on the candidate's test window,
    on the same impressions."""
    max_gauc_loss: Share = 0.005
    max_logloss_gain: Annotated[float, Field(ge=0)] = 0.005
    """Log loss by which a candidate may be worse than the champion, nats."""
    max_miscalibration_gain: Annotated[float, Field(ge=0)] = 0.1
    """By how much a candidate's calibration may be further from 1 than the champion's."""
    min_coverage_of_champion: Share = 0.9
    """Share of the users in the champion's snapshot, without erased ones, that the candidate's must hold, too."""
    approval: bool = False
    """A person approves what has passed the gates before it serves."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.calibration[0] > self.calibration[1]:
            raise ValueError(f"calibration: lowest {self.calibration[0]} is above highest {self.calibration[1]}")
        return self


class RegistryConfig(Section):
    """Names in MLflow."""

    model_name: Annotated[str, Field(pattern=r"^[^/:]+$")] = "encode-ctr"
    experiment: str = "encode"


class Config(Section):
    """All settings of one log: a preset plus the defaults."""

    name: str
    source: SourceConfig = SourceConfig()
    validation: ValidationConfig = ValidationConfig()
    model: ModelConfig = ModelConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    training: TrainingConfig = TrainingConfig()
    refresh: RefreshConfig = RefreshConfig()
    release: ReleaseConfig = ReleaseConfig()
    registry: RegistryConfig = RegistryConfig()


def presets() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in (resources.files("encode") / "presets").iterdir())


def load_config(preset: str) -> Config:
    """Load a preset by name, or a user's own from a path that ends in .yaml or .yml.

    A relative `source.path` in a user's file is taken from the folder of that file.

    Raises:
        ConfigError: names the preset, the key, what was found and what was expected.
    """
    if preset.endswith((".yaml", ".yml")):
        path = Path(preset)
        if not path.is_file():
            raise ConfigError(f"preset {preset}: {'a folder, expected a' if path.is_dir() else 'no such'} file")
        try:
            text, folder = path.read_text(encoding="utf-8-sig"), path.absolute().parent
        except UnicodeDecodeError as error:
            raise ConfigError(f"preset {preset}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    elif preset in presets():
        text, folder = (resources.files("encode") / "presets" / f"{preset}.yaml").read_text(), None
    else:
        raise ConfigError(f"preset {preset!r}: unknown; have {', '.join(presets())}, or give a path to a .yaml file")
    values = _parsed(preset, text)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"preset {preset}: found {found}, expected settings as `section: ...`")
    config = _validated(preset, {"name": Path(preset).stem} | values)
    source = config.source
    if folder and source.path and not source.path.is_absolute():
        path = folder / source.path
        # A link keeps its own name; `.` and `..` are none.
        path = path.resolve() if source.path.name in ("", "..") else path.parent.resolve() / path.name
        config = config.model_copy(update={"source": source.model_copy(update={"path": path})})
    return config


def _parsed(preset: str, text: str) -> Any:
    """Parse YAML; a key that stands there twice, of which YAML would silently take the last, is refused."""
    import yaml

    try:
        sections, walked = [yaml.compose(StringIO(text), yaml.SafeLoader)], set()
        while sections:
            section = sections.pop()
            if not isinstance(section, yaml.CollectionNode) or id(section) in walked:  # an alias may lead back
                continue
            walked.add(id(section))
            if isinstance(section, yaml.SequenceNode):
                sections += section.value
                continue
            sections += [value for _, value in section.value]
            seen: set[str] = set()
            for key in (key for key, _ in section.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise ConfigError(f"preset {preset}: {key.value} a second time in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return yaml.safe_load(StringIO(text))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is in no calendar
        told = " ".join(str(error).replace('"<file>", ', "").split())  # what StringIO is called
        raise ConfigError(f"preset {preset}: not YAML: {told}") from None
    except RecursionError:
        raise ConfigError(f"preset {preset}: nested too deeply, expected settings as `section: ...`") from None


def _validated(preset: str, values: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "preset"
            if problem["type"] == "extra_forbidden":
                lines.append(f"{where}: unknown key; {_known_keys(problem['loc'])}")
            else:
                lines.append(f"{where}: {problem['msg']}, found {problem.get('input')!r}")
        raise ConfigError(f"preset {preset}: " + "; ".join(lines)) from None


def _known_keys(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return "see encode/config.py"
        section = field.annotation
    return "expected one of " + ", ".join(section.model_fields)


class Places(Section):
    """Where a run reads and writes."""

    store: str
    """`s3://bucket[/prefix]` or a folder."""
    endpoint_url: str | None = None
    """None means the cloud's own endpoint for the region."""
    region: str = "us-east-1"
    access_key: str | None = None
    """None lets the client find credentials (profile, role)."""
    secret_key: SecretStr | None = None
    single_writer: bool = False
    """Use a store that ignores conditional writes, on your word that only one process publishes."""
    tracking_uri: str | None = None
    serving_url: str | None = None
    serving_key: SecretStr | None = None
    """Where the serving process asks for one."""
    spark_master: str | None = None
    """`spark://host:port`, `yarn`, `k8s://...`, `local-cluster[n,cores,MiB]`: for `refresh.engine: spark`."""
    scratch: Path | None = None
    """Folder for rows on their way to their buckets; None takes the system's folder for temporary files."""

    @field_validator("endpoint_url", "tracking_uri", "serving_url")
    @classmethod
    def _check(cls, address: str | None) -> str | None:
        """Refuse a name or a password in an address: addresses are logged, and registered with the model."""
        parts = urlsplit(address or "")
        if parts.scheme in ("http", "https") and "@" in parts.netloc:
            raise ConfigError(
                f"address of {parts.hostname}: holds a user name or a password, which would be shown wherever the "
                "address is; give the keys of the store as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, those of "
                "MLflow as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, that of serving as ENCODE_SERVING_KEY"
            )
        return address

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the variables that S3 and MLflow clients already read, and those that begin with ENCODE_.

        Raises:
            ConfigError: ENCODE_STORE is not set.
        """
        get = environment.get
        store = get("ENCODE_STORE")
        if not store:
            raise ConfigError(
                "ENCODE_STORE is not set; expected s3://bucket[/prefix] or a folder. "
                "`encode stack up` starts a local one, `--workdir` uses a folder without any server"
            )
        secret, key = get("AWS_SECRET_ACCESS_KEY"), get("ENCODE_SERVING_KEY")
        return cls(
            store=store,
            endpoint_url=get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL"),
            region=get("AWS_DEFAULT_REGION") or get("AWS_REGION") or "us-east-1",
            access_key=get("AWS_ACCESS_KEY_ID"),
            secret_key=SecretStr(secret) if secret else None,
            single_writer=get("ENCODE_SINGLE_WRITER") == "1",
            tracking_uri=get("MLFLOW_TRACKING_URI"),
            serving_url=get("ENCODE_SERVING_URL"),
            serving_key=SecretStr(key) if key else None,
            **_engine_places(environment),
        )

    @classmethod
    def in_folder(cls, workdir: Path) -> Self:
        """Return places inside one folder, without any server; engines are those of the environment."""
        root = workdir.absolute()
        return cls(
            store=str(root / "store"),
            tracking_uri=f"sqlite:///{root / 'mlflow' / 'mlflow.db'}",
            **_engine_places(os.environ),
        )


def _engine_places(environment: Mapping[str, str]) -> dict[str, Any]:
    return {"spark_master": environment.get("ENCODE_SPARK_MASTER"), "scratch": environment.get("ENCODE_SCRATCH")}
