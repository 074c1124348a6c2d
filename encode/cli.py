"""The command line: `encode <step>`, the same steps as the DAGs, and the local stack.

Nothing heavy is imported before a command is chosen, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encode import __version__

if TYPE_CHECKING:
    from encode.config import Config, Places

HOME = Path(os.environ.get("ENCODE_HOME", ".encode"))
_WEBHOOK_SECRET = "ENCODE_WEBHOOK_SECRET"  # as `encode.serving.webhook.SECRET`, which comes with all of serving


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    from encode.errors import ConfigError, EncodeError

    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EncodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        if os.environ.get("ENCODE_DEBUG") or not _from_outside(error):
            raise
        text = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {text}", file=sys.stderr)
        if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
            print("Is the stack up? See `encode stack status`.", file=sys.stderr)
        return 1
    return 0


def _from_outside(error: Exception) -> bool:
    """Tell errors of networks, stores and files, whose message says enough, from faults of this program."""
    families = ("botocore", "httpx", "requests", "urllib3", "mlflow", "sqlalchemy")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in families


# --- options -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encode",
        description="Long-term user interest for ranking: from behavior log to served probability.",
        epilog="Without --workdir, places come from the environment (ENCODE_STORE, AWS_*, MLFLOW_TRACKING_URI, "
        "ENCODE_SERVING_URL), else from the local stack in .encode/ (ENCODE_HOME).",
    )
    parser.add_argument("--version", action="version", version=f"encode {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    def with_step(command: argparse.ArgumentParser, *, needs_workdir: bool = False) -> argparse.ArgumentParser:
        command.add_argument(
            "--preset",
            default=os.environ.get("ENCODE_PRESET") or "complete-journey",
            help="settings: a preset, or a .yaml file (default: ENCODE_PRESET, now %(default)s)",
        )
        command.add_argument(
            "--workdir",
            type=Path,
            required=needs_workdir,
            help="keep everything in this folder and use no server",
        )
        command.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
        return command

    whole = with_step(add("run", _run_all, "run all steps in one process, without any server"), needs_workdir=True)
    whole.add_argument("--cache", type=Path, help="folder for downloads (default: the user's cache)")
    whole.set_defaults(begins=True)
    land = with_step(add("land", _land, "split the preset's raw log into daily partitions"))
    land.add_argument("--cache", type=Path, help="folder for downloads (default: the user's cache)")
    land.set_defaults(begins=True)
    validate = with_step(add("validate", _validate, "turn raw partitions into behaviors and quarantine"))
    validate.add_argument("--start", metavar="DAY", help="first day, YYYY-MM-DD")
    validate.add_argument("--end", metavar="DAY", help="first day that is not validated (default: one day)")
    _with_dry_run(validate)
    text = "judge anew what is in quarantine, and add what is good by now"
    replay = with_step(add("replay", _replay, text))
    replay.add_argument("--start", metavar="DAY", help="first day, YYYY-MM-DD")
    replay.add_argument("--end", metavar="DAY", help="first day that is not replayed (default: one day)")
    _with_dry_run(replay)
    docs = with_step(add("docs", _docs, "fetch what validation said: an index over the days, and a day's Data Docs"))
    docs.add_argument("day", nargs="?", metavar="DAY", help="also show why its rows were rejected, YYYY-MM-DD")
    docs.add_argument("--start", metavar="DAY", help="first day of the index (default: all days)")
    docs.add_argument("--end", metavar="DAY", help="first day that is not in the index (default: one day)")
    docs.add_argument(
        "--to", type=Path, default=HOME / "docs", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    train = with_step(add("train", _train, "train space and CTR model, register a candidate"))
    train.add_argument("--as-of", metavar="DAY", required=True, help="use behaviors before this day")
    _with_dry_run(train)
    refresh = with_step(add("refresh", _refresh, "refresh every user's interests and publish the snapshot"))
    refresh.add_argument("--as-of", metavar="DAY", required=True, help="use behaviors before this day")
    _with_dry_run(refresh)
    release = with_step(add("release", _release, "let the candidate serve if it passes its gates"))
    decided = release.add_mutually_exclusive_group()
    decided.add_argument(
        "--approve", type=_version, metavar="VERSION", help="you looked at its report: with release.approval it serves"
    )
    decided.add_argument(
        "--refuse", type=_version, metavar="VERSION", help="it must not serve, whatever its gates say; give --reason"
    )
    _with_dry_run(decided)
    release.add_argument("--reason", type=_text, metavar="TEXT", help="why it is refused")
    rollback = with_step(add("rollback", _rollback, "make the champion before this one serve again"))
    rollback.add_argument(
        "--to", type=_version, metavar="VERSION", help="another version that was champion (default: the one before)"
    )
    rollback.add_argument("--reason", type=_text, metavar="TEXT", help="noted on the version that is left")
    _with_dry_run(rollback)
    _add_erasure(add, with_step)
    _add_serving(add, with_step)
    _add_watching(add, with_step)
    _add_bench(commands)
    _add_stack(commands, add, with_step)
    return parser


def _add_erasure(add: Callable[..., Any], with_step: Callable[..., Any]) -> None:
    text = "keep users out of everything that is made from now on, and say where they still are"
    erase = with_step(add("erase", _erase, text))
    erase.add_argument("users", type=_id, nargs="+", metavar="USER", help="user id")
    erase.add_argument("--check", action="store_true", help="only say where they still are")
    prune = with_step(add("prune", _prune, "remove old histories and snapshots that nothing reaches"))
    prune.add_argument(
        "--keep-snapshots",
        type=_at_least(3),
        default=3,
        metavar="N",
        help="of each space, at least (default: %(default)s)",
    )
    prune.add_argument(
        "--older-than",
        type=_at_least(1),
        default=7,
        metavar="DAYS",
        help="than the current one (default: %(default)s)",
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")


def _add_serving(add: Callable[..., Any], with_step: Callable[..., Any]) -> None:
    serve = with_step(add("serve", _serve, "serve the champion over HTTP"))
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")
    text = f"folder for snapshots (default: snapshots in --workdir, else in {HOME})"
    serve.add_argument("--cache", type=Path, help=text.replace("%", "%%"))
    serve.add_argument(
        "--poll",
        type=_at_least(0.1),
        default=10.0,
        metavar="SECONDS",
        help="between looks for a new release (default: %(default)s)",
    )
    serve.add_argument("--max-age", type=int, metavar="DAYS", help="report an older snapshot as stale (default: never)")
    serve.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="SHA-256 of the API keys that are let in, one a line; also from ENCODE_SERVING_KEYS. "
        "Needed where --host is not the loopback interface",
    )
    rollout = serve.add_argument_group("rollout")
    rollout.add_argument(
        "--shard", default="0/1", metavar="PLACE/COUNT", help="hold only this part of the users, as 0/4 (default: all)"
    )
    rollout.add_argument(
        "--max-model-ms",
        type=_at_least(0.001),
        default=50.0,
        metavar="MS",
        help="for 1,000 candidates in a trial; a slower release is refused (default: %(default)s)",
    )
    rollout.add_argument(
        "--challenger", metavar="ALIAS", help="serve the version with this alias, too, as candidate (default: none)"
    )
    for name, text in (
        ("--challenger-share", "of the users: answered by the challenger"),
        ("--shadow-share", "of the champion's requests: scored by the challenger, too, without anybody waiting"),
    ):
        rollout.add_argument(name, type=_share, default=0.0, metavar="SHARE", help=f"{text} (default: %(default)s)")
    text = "threads that compute while another reads and answers (default: one for each processor but one)"
    serve.add_argument("--threads", type=_at_least(1), metavar="N", help=text)
    serve.add_argument("--new-key", action="store_true", help="print a new API key and its SHA-256, and end")
    limits = serve.add_argument_group("limits")
    for name, kind, default, unit, text in (
        ("--max-body", _at_least(1), 1 << 20, "BYTES", "of a request"),
        ("--receive-timeout", _at_least(0.001), 5.0, "SECONDS", "for the body to arrive"),
        ("--max-requests", _at_least(1), 64, "N", "at work or waiting; more are told to come back"),
        ("--deadline", _at_least(0.001), 5.0, "SECONDS", "for the answer, once the body is there"),
        ("--drain-delay", _at_least(0.0), 1.0, "SECONDS", "after SIGTERM: not ready, but still taking requests"),
        ("--drain-timeout", _at_least(1), 10, "SECONDS", "after that: for requests at work to finish"),
    ):
        limits.add_argument(name, type=kind, default=default, metavar=unit, help=f"{text} (default: %(default)s)")
    webhook = with_step(add("webhook", _webhook, "let MLflow tell a serving process when an alias moves"))
    webhook.add_argument(
        "--url", required=True, help=f"of the serving process; the secret is read from {_WEBHOOK_SECRET}"
    )
    score = with_step(add("score", _score, "score items for a user with what serves now"))
    score.add_argument("--user", type=_id, required=True, help="user id")
    score.add_argument("--items", type=_ids, required=True, metavar="ID,ID,...", help="candidate item ids")
    explain = with_step(add("explain", _explain, "show a user's interests: weight, size, newest time, top items"))
    explain.add_argument("user", type=_id, help="user id")
    explain.add_argument("--item", type=_id, help="also show how much this item attends to each interest")


def _add_watching(add: Callable[..., Any], with_step: Callable[..., Any]) -> None:
    lineage = with_step(add("lineage", _lineage, "show what a score, snapshot, version or partition was made from"))
    lineage.add_argument(
        "what",
        metavar="WHAT",
        help="a score (its JSON as a file, or - for stdin), a bundle id, a snapshot, behaviors/dt=DAY or raw/dt=DAY, "
        "the number of a model version, or any output by its key",
    )
    lineage.add_argument("--verify", action="store_true", help="also read every file, and check it by its digest")
    monitor = with_step(add("monitor", _monitor, "measure what serves: its age, its drift, its skew"))
    monitor.add_argument("--as-of", metavar="DAY", required=True, help="ages are counted to the start of this day")
    monitor.add_argument(
        "--score-days",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="also score the behaviors of the N newest days as training did (default: none)",
    )
    feedback = with_step(add("feedback", _feedback, "measure logged scores by what came of them, day by day"))
    feedback.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="Parquet file, or a folder (default: feedback/ in the store)",
    )
    feedback.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .png, .svg or .pdf")


def _add_bench(commands: Any) -> None:
    from encode.quality.command import add_options, run

    bench = commands.add_parser("bench", help="hold models against each other", description="Benchmarks.")
    actions = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "train every model of long-term interest on the same data, and compare"
    quality = actions.add_parser("quality", help=text, description=text[0].upper() + text[1:] + ".")
    quality.set_defaults(run=run)
    add_options(quality)


def _add_stack(commands: Any, add: Callable[..., Any], with_step: Callable[..., Any]) -> None:
    quickstart = add("quickstart", _quickstart, "start the local stack and run everything through Airflow")
    quickstart.add_argument("--preset", default="complete-journey", help="settings (default: %(default)s)")
    quickstart.add_argument("--json", action="store_true", help="print the summary as one line of JSON")
    _with_ports(quickstart)
    stack = commands.add_parser("stack", help="start, show, stop the local stack", description="The local stack.")
    actions = stack.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("up", _stack_up, "start what is not running: object store, MLflow, Airflow, serving"),
        ("status", _stack_status, "show state, address and log of each component"),
        ("down", _stack_down, "stop what was started; data stay"),
        ("clean", _stack_clean, "stop what was started and remove its data"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.set_defaults(run=run)
        action.add_argument("--json", action="store_true", help="print as one line of JSON")
        if name == "up":
            _with_ports(action)


def _with_ports(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dags", type=Path, default=Path("dags"), help="folder of the DAGs (default: %(default)s)")
    for name, port in (("serving", 8000), ("mlflow", 5000), ("airflow", 8080), ("objectstore", 8333)):
        text = f"default: the one asked for last, else {port}; a free one if that is taken; 0 is any"
        command.add_argument(f"--{name}-port", type=_port, help=text)


def _with_dry_run(command: argparse._ActionsContainer) -> None:
    command.add_argument("--dry-run", action="store_true", help="only say what would be done, and write nothing")


def _at_least(least: float) -> Callable[[str], float]:
    """Return a parser of finite numbers of the kind of `least`."""
    kind = type(least)

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} or more")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, expected a text; is a variable of your shell empty?")
    return text


def _version(text: str) -> str:
    number = _text(text).strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected the number of a version, as MLflow shows it")
    return number


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 to 65535")
    return int(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 to 1")
    return value


def _id(text: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and 0 < int(digits) < 2**63):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an id: a whole number from 1 to 2^63 - 1")
    return int(digits)


def _ids(text: str) -> list[int]:
    try:
        return [_id(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected ids separated by commas, as 12,34,56: whole numbers above 0, none left empty"
        ) from None


# --- steps -------------------------------------------------------------------------------------------------


def _places(options: argparse.Namespace) -> Places:
    from encode.config import Places
    from encode.errors import ConfigError

    if options.workdir:
        places = Places.in_folder(options.workdir)
        if not (getattr(options, "begins", False) or Path(places.store).is_dir()):
            raise ConfigError(
                f"--workdir {options.workdir}: there is no store in it; `encode run` or `encode land` begins one"
            )
        return places
    if not os.environ.get("ENCODE_STORE"):
        from encode.stack import is_stopped

        if is_stopped(HOME):
            raise ConfigError(
                f"the object store of the local stack in {HOME} is stopped: `encode stack up` starts what is; or set "
                "ENCODE_STORE to another store"
            )
    return Places.from_environment(_environment())


def _environment() -> dict[str, str]:
    from encode.stack.home import load_client_environment

    return {**load_client_environment(HOME), **os.environ}


def _config(options: argparse.Namespace) -> Config:
    from encode.config import load_config

    return load_config(options.preset)


def _given(options: argparse.Namespace) -> tuple[Config, Places, Callable[[str], None]]:
    """Return settings, places, and who is told of progress.

    A command checks its own options before this, and imports what takes seconds after it.
    """
    return _config(options), _places(options), _say(options)


def _say(options: argparse.Namespace) -> Callable[[str], None]:
    """Progress goes to stderr when the summary is for a program to read."""
    stream = sys.stderr if options.json else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def _show(options: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    if options.json:
        print(json.dumps(summary))


def _run_all(options: argparse.Namespace) -> None:
    config, places, say = _given(options)

    from encode import steps
    from encode.schema import Window, parse_day

    say(f"landing {config.name} in {places.store}")
    landed = steps.land(config, places, say, options.cache)
    window = Window(
        parse_day(landed["first_day"], "first day"), parse_day(landed["last_day"], "last day") + timedelta(days=1)
    )
    say(f"validating {window.in_words()}")
    summary = {"land": landed, "validate": steps.validate(config, places, window, say)}
    say(f"training as of {window.end}")
    summary["train"] = steps.train(config, places, window.end, say)
    say(f"refreshing interests as of {window.end}")
    summary["refresh"] = steps.refresh(config, places, window.end, say)
    say("releasing")
    summary["release"] = steps.release(config, places, say)
    _show(options, summary)


def _land(options: argparse.Namespace) -> None:
    config, places, say = _given(options)

    from encode import steps

    _show(options, steps.land(config, places, say, options.cache))


def _days(options: argparse.Namespace) -> tuple[str | None, str | None]:
    from encode.errors import ConfigError

    if not options.start and not options.end:
        raise ConfigError("which days? give --start DAY, and --end DAY, the first that is not among them, for several")
    return options.start, options.end


def _validate(options: argparse.Namespace) -> None:
    from encode.schema import resolve_window

    window = resolve_window(*_days(options))
    config, places, say = _given(options)

    from encode import plan, steps

    step = plan.validate if options.dry_run else steps.validate
    _show(options, step(config, places, window, say))


def _replay(options: argparse.Namespace) -> None:
    from encode.schema import resolve_window

    window = resolve_window(*_days(options))
    config, places, say = _given(options)

    from encode import plan, steps

    step = plan.replay if options.dry_run else steps.replay
    _show(options, step(config, places, window, say))


def _docs(options: argparse.Namespace) -> None:
    from encode.schema import parse_day, resolve_window

    day = parse_day(options.day, "day") if options.day else None
    window = resolve_window(options.start, options.end) if options.start or options.end else None
    config, places, say = _given(options)

    from encode import steps

    _show(options, steps.docs(config, places, options.to, day, window, say))


def _train(options: argparse.Namespace) -> None:
    from encode.schema import parse_day

    as_of = parse_day(options.as_of, "--as-of")
    config, places, say = _given(options)

    from encode import plan, steps

    step = plan.train if options.dry_run else steps.train
    _show(options, step(config, places, as_of, say))


def _refresh(options: argparse.Namespace) -> None:
    from encode.schema import parse_day

    as_of = parse_day(options.as_of, "--as-of")
    config, places, say = _given(options)

    from encode import plan, steps

    step = plan.refresh if options.dry_run else steps.refresh
    _show(options, step(config, places, as_of, say))


def _release(options: argparse.Namespace) -> None:
    from encode.errors import ConfigError

    if (options.refuse is None) != (options.reason is None):
        raise ConfigError("release: --refuse VERSION and --reason TEXT belong together")
    config, places, say = _given(options)

    from encode import plan, steps

    if options.dry_run:
        _show(options, plan.release(config, places, say))
    elif options.refuse is not None:
        _show(options, steps.refuse(config, places, options.refuse, options.reason, say))
    else:
        _show(options, steps.release(config, places, say, approve=options.approve))


def _rollback(options: argparse.Namespace) -> None:
    config, places, say = _given(options)

    from encode import plan, steps

    step = plan.rollback if options.dry_run else steps.rollback
    _show(options, step(config, places, say, options.to, options.reason))


def _erase(options: argparse.Namespace) -> None:
    config, places, say = _given(options)

    from encode import steps

    act = steps.remains if options.check else steps.erase
    _show(options, act(config, places, options.users, say))


def _prune(options: argparse.Namespace) -> None:
    config, places, say = _given(options)

    from encode import steps

    _show(options, steps.prune(config, places, options.keep_snapshots, options.older_than, options.dry_run, say))


# --- serving -----------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> None:
    if options.new_key:
        _new_key(options)
        return

    from encode.errors import ConfigError
    from encode.serving.keys import read_hashes, require_keys
    from encode.serving.shard import Shard
    from encode.stack.ports import why_not_free

    if why := why_not_free(options.port, options.host):
        raise ConfigError(f"{options.host}:{options.port}: {why}; choose another --host or --port")
    environment = _environment()
    hashes = read_hashes(options.keys, environment.get("ENCODE_SERVING_KEYS", ""))
    require_keys(options.host, hashes)
    shard = Shard.parse(options.shard)
    config, places, _ = _given(options)

    from encode.serving.app import create_app
    from encode.serving.limits import Limits
    from encode.serving.local_snapshot import claimed
    from encode.serving.rollout import Rollout
    from encode.serving.server import serve

    cache = options.cache or (options.workdir or HOME) / "snapshots"
    app = create_app(
        places,
        config.registry,
        cache,
        options.poll,
        options.max_age,
        limits=Limits(options.max_body, options.receive_timeout, options.max_requests, options.deadline),
        hashes=hashes,
        rollout=Rollout(
            shard, options.max_model_ms, options.challenger, options.challenger_share, options.shadow_share
        ),
        webhook_secret=environment.get(_WEBHOOK_SECRET, ""),
        threads=options.threads,
    )
    with claimed(cache):
        serve(app, options.host, options.port, options.drain_delay, options.drain_timeout)


def _new_key(options: argparse.Namespace) -> None:
    from encode.serving.keys import hash_of, new_key

    key = new_key()
    _show(options, {"key": key, "sha256": hash_of(key)})
    if not options.json:
        print(f"key     {key}\nsha256  {hash_of(key)}")


def _webhook(options: argparse.Namespace) -> None:
    from encode.errors import ConfigError

    secret = _environment().get(_WEBHOOK_SECRET)
    if not secret:
        raise ConfigError(f"{_WEBHOOK_SECRET} is not set; give the serving process and this command the same secret")
    config, places, _ = _given(options)

    from encode.registry import Registry
    from encode.serving.webhook import PATH

    url = options.url.rstrip("/") + PATH
    webhook = Registry(places, config.registry).notify(url, secret)
    _show(options, {"webhook": webhook, "url": url})


def _score(options: argparse.Namespace) -> None:
    config, places, _ = _given(options)

    from encode.errors import ConfigError, DataError
    from encode.schema import probability_in_digits
    from encode.serving.client import score

    try:
        answer = score(places, config.registry, options.user, options.items)
    except DataError as error:
        raise ConfigError(f"score: the service refuses this request: {error}") from None
    if options.json:
        print(json.dumps(answer))
        return
    for item, probability in zip(answer["item_ids"], answer["probabilities"], strict=True):
        print(f"{item:>12}  {probability_in_digits(probability):>8}")
    _print_origin(answer)
    for name, value in answer["fallbacks"].items():
        if value:
            print(f"fallback: {name.replace('_', ' ')}{'' if value is True else f' {value}'}")


def _explain(options: argparse.Namespace) -> None:
    config, places, _ = _given(options)

    from datetime import UTC, datetime

    from encode.serving.client import interests

    answer = interests(places, config.registry, options.user, options.item)
    if options.json:
        print(json.dumps(answer))
        return
    for interest in answer["interests"]:
        newest = datetime.fromtimestamp(interest["newest"], UTC)
        items = ", ".join(f"{item['name'] or 'item'} ({item['item_id']})" for item in interest["top_items"][:3])
        attention = f"  attention {interest['attention']:.3f}" if "attention" in interest else ""
        print(
            f"{interest['weight']:6.1%} {interest['size']:>6} behaviors, newest {newest:%Y-%m-%d}{attention}  {items}"
        )
    if answer.get("attention_to_itself"):
        print(f"item {options.item} attends {answer['attention_to_itself']:.3f} to the user's own past with it")
    if answer.get("unknown_item"):
        print(f"item {options.item} is unknown: its attention is that of an average new item")
    _print_origin(answer)


def _lineage(options: argparse.Namespace) -> None:
    from encode.errors import ArtifactError, ConfigError
    from encode.lineage_names import named, uri_of

    config, places, _ = _given(options)
    what, is_stdin = options.what, options.what == "-"
    is_score = is_stdin or Path(what).is_file()
    if not is_score and what.endswith(".json"):
        raise ConfigError(f"lineage: {what}: no such file")
    if not is_score:
        named(what, uri_of(places.store))

    from encode.lineage import Lineage
    from encode.lineage_text import tree
    from encode.registry import Registry
    from encode.schema import number_of
    from encode.storage import open_storage

    storage, registry = open_storage(places, writing=False), Registry(places, config.registry)
    lineage = Lineage(storage, registry, verify=options.verify)
    if is_score:
        data = sys.stdin.buffer.read() if is_stdin else Path(what).read_bytes()
        found = lineage.of_score(data, "stdin" if is_stdin else what)
    else:
        found = lineage.trace(what)
    _show(options, found.as_json())
    if not options.json:
        for line in tree(found):
            print(line)
        if options.verify:
            print(f"read and found to be what their digests say: {number_of(lineage.files_whole, 'file')}")
    if problems := found.all_problems():
        raise ArtifactError(f"lineage: missing, damaged or not as recorded: {number_of(len(problems), 'link')}")


def _monitor(options: argparse.Namespace) -> None:
    from encode.schema import parse_day

    as_of = parse_day(options.as_of, "--as-of")
    config, places, say = _given(options)

    from encode.monitoring.watch import Watch
    from encode.monitoring.words import lines
    from encode.registry import Registry
    from encode.storage import open_storage

    storage, registry = open_storage(places, writing=False), Registry(places, config.registry)
    told = Watch(storage, registry, as_of, say).look(options.score_days, config.training)
    _show(options, told)
    if not options.json:
        print("\n".join(lines(told)))


def _feedback(options: argparse.Namespace) -> None:
    from encode.errors import ConfigError

    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot: found {options.plot}, expected a name that ends in .png, .svg or .pdf")
    if options.source and not options.source.exists():
        raise ConfigError(f"feedback: {options.source}: no such file or folder")
    config, places, _ = _given(options)

    from encode.lineage import Lineage
    from encode.monitoring.feedback import measure, plot
    from encode.monitoring.words import numbers
    from encode.registry import Registry
    from encode.storage import open_storage

    storage = open_storage(places, writing=False)
    told = measure(storage, Lineage(storage, Registry(places, config.registry)), options.source)
    if options.plot:
        plot(told).savefig(options.plot)
    _show(options, told)
    if not options.json:
        print("\n".join(numbers({one.pop("day"): one for one in told["days"]})))
        print("\n".join(numbers({"whole": told["whole"], "bundles": told["bundles"]})))


def _print_origin(answer: Mapping[str, Any]) -> None:
    bundle = answer["bundle"]
    print(f"bundle {bundle['id']}: version {bundle['model_version']}, snapshot {bundle['snapshot']}")


# --- local stack -------------------------------------------------------------------------------------------


def _ports(options: argparse.Namespace) -> dict[str, int]:
    names = ("serving", "mlflow", "airflow", "objectstore")
    return {name: port for name in names if (port := getattr(options, f"{name}_port")) is not None}


def _stack_up(options: argparse.Namespace) -> None:
    from encode.stack import up

    stack = up(HOME, dags_folder=options.dags, ports=_ports(options), say=_say(options))
    _show(options, {"urls": dict(stack.urls), "credentials": str(stack.credentials_file)})
    if not options.json:
        for name, url in stack.urls.items():
            print(f"{name:>12}  {url}  log {stack.logs[name]}")
        print(f" credentials  {stack.credentials_file}")


def _stack_status(options: argparse.Namespace) -> None:
    from encode.errors import EncodeError
    from encode.stack import status

    states = status(HOME)
    _show(
        options, {one.name: {"state": one.state, "pid": one.pid, "url": one.url, "log": str(one.log)} for one in states}
    )
    if not options.json:
        for one in states:
            print(f"{one.name:>12}  {one.state:<8} {one.url:<24} log {one.log} {one.problem}".rstrip())
    if ill := [one.name for one in states if one.state != "healthy"]:
        raise EncodeError(f"not healthy: {', '.join(ill)}; `encode stack up` starts what does not run")


def _stack_down(options: argparse.Namespace) -> None:
    from encode.stack import down

    down(HOME, say=_say(options))


def _stack_clean(options: argparse.Namespace) -> None:
    from encode.stack import clean

    clean(HOME, say=_say(options))


def _quickstart(options: argparse.Namespace) -> None:
    from encode.quickstart import quickstart

    _show(options, quickstart(options.preset, HOME, options.dags, _ports(options), _say(options)))


if __name__ == "__main__":
    sys.exit(main())
