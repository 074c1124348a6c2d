"""Client of Airflow's REST API: unpause a DAG, trigger or backfill it, wait for the run and say how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import date, datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from encode.errors import ConfigError, EncodeError

Json = dict[str, Any]

# The first request that needs a database on a loaded machine has been seen to take 30 s.
TIMEOUT = 60.0
POLL_INTERVAL = 1.0
LOG_LINES = 30
PAGE = 100
_PRINTED = "task.stdout"
_OVER = ("success", "failed")
_BACKFILL_TRIES = 20
_BUSY_TRIES = 5

# An import error that the DAG processor has not taken back for so long is not of an older file.
IMPORT_ERROR_PATIENCE = 20.0


class AirflowClient:
    """A logged-in user of one Airflow.

    The token is fetched with the first request and again whenever Airflow refuses it. Errors of
    the network pass through as `httpx.TransportError`, unexpected answers as
    `httpx.HTTPStatusError` with Airflow's explanation in the message.

    Args:
        url: Address of the API server.
        username: A user of its auth manager.
        password: The user's password.
        transport: In place of the network, for tests.
    """

    def __init__(self, url: str, username: str, password: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._login = {"username": username, "password": password}
        # Proxies of the environment are for the way out of the machine, not for the loopback.
        is_local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=not is_local, transport=transport)

    def __enter__(self) -> AirflowClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_for_dag(self, dag_id: str, timeout: float = 120.0) -> Json:
        """Wait until Airflow has parsed `dag_id` and return what it knows of it.

        Raises:
            EncodeError: The file of that name cannot be imported, or the DAG did not appear in
                time; the message holds the import errors of all files.
        """
        deadline = time.monotonic() + timeout
        broken_since: dict[str, float] = {}
        while True:
            answer = self.request("GET", f"/dags/{quote(dag_id, safe='')}", accept=(404,))
            if answer.status_code != 404:
                return _json(answer)
            now = time.monotonic()
            errors = self.import_errors()
            broken_since = {name: broken_since.get(name, now) for name in errors}
            own = [since for name, since in broken_since.items() if name.endswith(f"{dag_id}.py")]
            if now > deadline or any(now - since > IMPORT_ERROR_PATIENCE for since in own):
                texts = "\n".join(f"{name}:\n{text.rstrip()}" for name, text in errors.items())
                raise EncodeError(
                    f"{self.url}: DAG {dag_id} is not there, expected it in the DAG folder. Import errors: "
                    + (texts or "none; is its file in the folder that Airflow reads?")
                )
            time.sleep(POLL_INTERVAL)

    def import_errors(self) -> dict[str, str]:
        """Traceback by DAG file, of the files that Airflow could not import."""
        found = _json(self.request("GET", "/importErrors", params={"limit": PAGE}))["import_errors"]
        return {error["filename"]: error["stack_trace"] for error in found}

    def unpause(self, dag_id: str) -> None:
        """Let the scheduler run `dag_id`; new DAGs are paused."""
        self._set_paused(dag_id, paused=False)

    def pause(self, dag_id: str) -> None:
        """Let the scheduler start no run of `dag_id`; what runs goes on."""
        self._set_paused(dag_id, paused=True)

    def _set_paused(self, dag_id: str, *, paused: bool) -> None:
        self.request("PATCH", f"/dags/{quote(dag_id, safe='')}", json={"is_paused": paused})

    def trigger(
        self,
        dag_id: str,
        conf: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        logical_date: datetime | None = None,
    ) -> Json:
        """Create a run of `dag_id` and return it; the existing run when `run_id` is already taken.

        Args:
            dag_id: The DAG.
            conf: Parameters, checked by Airflow against the DAG's schema.
            run_id: Id of the run; Airflow makes one up when it is None.
            logical_date: With a time zone; most of our DAGs are triggered without one.

        Raises:
            ConfigError: Airflow refuses `conf`.
        """
        body: Json = {"logical_date": logical_date.isoformat() if logical_date else None, "conf": dict(conf or {})}
        if run_id is not None:
            body["dag_run_id"] = run_id
        answer = self.request("POST", f"/dags/{quote(dag_id, safe='')}/dagRuns", json=body, accept=(400, 409, 422))
        if answer.status_code == 409 and run_id is not None:
            return self.run(dag_id, run_id)
        if answer.status_code in (400, 409, 422):
            raise ConfigError(f"{dag_id}: Airflow refuses the run with conf {body['conf']}: {_explanation(answer)}")
        return _json(answer)

    def backfill(
        self, dag_id: str, first: date, last: date, conf: Mapping[str, Any] | None = None, max_active_runs: int = 1
    ) -> Json:
        """Create a run for each data interval of `dag_id` that begins on a day from `first` to `last`.

        The DAG is paused meanwhile. On SQLite Airflow 3.3 often answers 503 and takes back what it has created by
        then; its scheduler ends if it has begun with a run that is taken back.

        Raises:
            ConfigError: the DAG has no schedule of its own, another backfill of it runs, or Airflow refuses `conf`.
        """
        path = f"/dags/{quote(dag_id, safe='')}"
        was_paused = _json(self.request("GET", path))["is_paused"]
        body = {
            "dag_id": dag_id,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "dag_run_conf": dict(conf or {}),
            "max_active_runs": max_active_runs,
        }
        self.pause(dag_id)
        try:
            for _ in range(_BACKFILL_TRIES):
                answer = self.request("POST", "/backfills", json=body, accept=(400, 409, 422, 503))
                if answer.status_code != 503:
                    break
                time.sleep(POLL_INTERVAL)
        finally:
            if not was_paused:
                self.unpause(dag_id)
        if answer.status_code in (400, 409, 422):
            raise ConfigError(f"{dag_id}: Airflow refuses the backfill {first} to {last}: {_explanation(answer)}")
        return _json(_checked(answer))

    def clear(self, dag_id: str, run_id: str) -> None:
        """Let all tasks of a run begin again."""
        body = {"dry_run": False, "dag_run_id": run_id, "only_failed": False, "reset_dag_runs": True}
        self.request("POST", f"/dags/{quote(dag_id, safe='')}/clearTaskInstances", json=body)

    def run(self, dag_id: str, run_id: str) -> Json:
        """One run of `dag_id`; its "state" is queued, running, success or failed."""
        return _json(self.request("GET", _run_path(dag_id, run_id)))

    def runs(self, dag_id: str, after: datetime | None = None) -> list[Json]:
        """The latest runs of `dag_id`, oldest first; with `after` those due at or after that time."""
        params: Json = {"order_by": "-run_after", "limit": PAGE}
        if after is not None:
            params["run_after_gte"] = after.isoformat()
        answer = self.request("GET", f"/dags/{quote(dag_id, safe='')}/dagRuns", params=params)
        return list(reversed(_json(answer)["dag_runs"]))

    def task_instances(self, dag_id: str, run_id: str) -> list[Json]:
        """The tasks of a run with "task_id", "map_index", "state", "duration", "try_number"."""
        found: list[Json] = []
        while True:
            params = {"limit": PAGE, "offset": len(found)}
            page = _json(self.request("GET", f"{_run_path(dag_id, run_id)}/taskInstances", params=params))
            found += page["task_instances"]
            if len(found) >= page["total_entries"] or not page["task_instances"]:
                return found

    def task_log(self, dag_id: str, run_id: str, task: Mapping[str, Any], count: int = LOG_LINES) -> str:
        """The last `count` lines that the latest try of a task wrote."""
        content = self._log(dag_id, run_id, task)
        if content is None:
            return "(no log was found)"
        lines = [line for entry in content if not (line := _log_line(entry)).startswith(("::group::", "::endgroup::"))]
        return "\n".join("\n".join(lines).splitlines()[-count:])

    def _tell(self, dag_id: str, run_id: str, task: Mapping[str, Any], told: int, say: Callable[[str], None]) -> int:
        """Say what a task has printed beyond its first `told` lines, and return how many there are now."""
        content = self._log(dag_id, run_id, task) or []
        printed = [entry["event"] for entry in content if isinstance(entry, dict) and entry.get("logger") == _PRINTED]
        for line in printed[told:]:
            say(f"  {line}")
        return max(told, len(printed))

    def _log(self, dag_id: str, run_id: str, task: Mapping[str, Any]) -> list[str | Json] | None:
        """The entries that the latest try of a task has logged so far."""
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{quote(task['task_id'], safe='')}/logs/{task['try_number']}"
        params = {"map_index": task["map_index"], "full_content": True}
        answer = self.request("GET", path, params=params, accept=(404,))
        if answer.status_code == 404:
            return None
        content = _json(answer)["content"]
        entries: list[str | Json] = list(content.splitlines() if isinstance(content, str) else content)
        return entries

    def wait(self, dag_id: str, run_id: str, say: Callable[[str], None] = print, timeout: float = 1800.0) -> Json:
        """Wait until a run succeeds and return it, saying each change of a task's state and what it prints meanwhile.

        Raises:
            EncodeError: The run failed (the message holds each failed task's address in the UI and
                the end of its log), or it is not over after `timeout` seconds.
        """
        began = time.monotonic()
        seen: dict[str, str | None] = {}
        told: dict[str, int] = {}
        over_before = self.run(dag_id, run_id)["state"] == "success"
        while True:
            run = self.run(dag_id, run_id)
            # The run first, its tasks after: then the last look shows every task as it ended.
            tasks = self.task_instances(dag_id, run_id)
            for task in sorted(tasks, key=lambda task: task["start_date"] or "~"):
                name, state = _task_name(task), task["state"]
                if state in ("running", "success", "failed", "skipped") and not over_before:
                    told[name] = self._tell(dag_id, run_id, task, told.get(name, 0), say)
                if state is not None and seen.get(name) != state:
                    seen[name] = state
                    say(f"{dag_id}.{name}: {state}{_duration(task)}")
            if run["state"] == "success":
                return run
            if run["state"] == "failed":
                raise EncodeError(self._failure(dag_id, run_id, tasks))
            if time.monotonic() - began > timeout:
                states = ", ".join(f"{name} {state}" for name, state in seen.items()) or "no task has begun"
                raise EncodeError(
                    f"{dag_id} run {run_id}: {run['state']} after {timeout:.0f} s, expected it to be over "
                    f"({states}); {self.run_url(dag_id, run_id)}"
                )
            time.sleep(POLL_INTERVAL)

    def task_result(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """What a task of a run returned, None when it returned nothing."""
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{quote(task_id, safe='')}/xcomEntries/return_value"
        answer = self.request("GET", path, params={"deserialize": "false", "stringify": "false"}, accept=(404,))
        return None if answer.status_code == 404 else _json(answer)["value"]

    def wait_for_consumer(self, dag_id: str, source_dag_id: str, source_run_id: str, timeout: float) -> Json:
        """Wait until an asset event of another DAG's run has triggered a run of `dag_id`, and return that run.

        Ids of runs are unique within a DAG only.

        Raises:
            EncodeError: no run came in `timeout` seconds.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            # Airflow 3.3 cannot show the events of a run that has not started.
            for run in reversed([run for run in self.runs(dag_id) if run["start_date"]]):
                path = f"{_run_path(dag_id, run['dag_run_id'])}/upstreamAssetEvents"
                events = _json(self.request("GET", path))["asset_events"]
                if any(
                    (one["source_dag_id"], one["source_run_id"]) == (source_dag_id, source_run_id) for one in events
                ):
                    return run
            time.sleep(POLL_INTERVAL)
        raise EncodeError(
            f"{dag_id}: no run was triggered by {source_dag_id} {source_run_id} in {timeout:.0f} s; is the DAG paused? "
            f"See {self.url}"
        )

    def run_url(self, dag_id: str, run_id: str) -> str:
        """Address of a run in the UI."""
        return f"{self.url}/dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"

    def _failure(self, dag_id: str, run_id: str, tasks: list[Json]) -> str:
        text = [f"{dag_id} run {run_id} failed, {self.run_url(dag_id, run_id)}"]
        for task in tasks:
            if task["state"] != "failed":
                continue
            mapped = f"/mapped/{task['map_index']}" if task["map_index"] >= 0 else ""
            url = f"{self.run_url(dag_id, run_id)}/tasks/{quote(task['task_id'], safe='')}{mapped}"
            log = self.task_log(dag_id, run_id, task)
            text.append(f"task {_task_name(task)} failed, {url}; the end of its log:")
            text += [f"    {line}" for line in log.splitlines()]
        return "\n".join(text)

    def request(self, method: str, path: str, *, accept: tuple[int, ...] = (), **options: Any) -> httpx.Response:
        """Send what has no method here to `path` below /api/v2; `accept` are error statuses that are no error."""
        if "authorization" not in self._http.headers:
            self._log_in()
        answer = self._http.request(method, f"/api/v2{path}", **options)
        if answer.status_code == 401:
            self._log_in()
            answer = self._http.request(method, f"/api/v2{path}", **options)
        # On SQLite, which has one writer, a change may fail beside others; to repeat these changes nothing.
        tries = _BUSY_TRIES if method in ("GET", "PATCH") else 0
        while answer.status_code in (500, 503) and answer.status_code not in accept and tries:
            time.sleep(POLL_INTERVAL)
            tries -= 1
            answer = self._http.request(method, f"/api/v2{path}", **options)
        return _checked(answer, accept)

    def _log_in(self) -> None:
        self._http.headers.pop("authorization", None)
        answer = self._http.post("/auth/token", json=self._login)
        if answer.status_code == 401:
            raise ConfigError(
                f"{self.url}: Airflow refuses user {self._login['username']!r}; the password is in credentials.json"
            )
        token = _json(_checked(answer))["access_token"]
        self._http.headers["authorization"] = f"Bearer {token}"


def _run_path(dag_id: str, run_id: str) -> str:
    return f"/dags/{quote(dag_id, safe='')}/dagRuns/{quote(run_id, safe='')}"


def _json(answer: httpx.Response) -> Json:
    found: Json = answer.json()
    return found


def _checked(answer: httpx.Response, accept: tuple[int, ...] = ()) -> httpx.Response:
    if answer.is_success or answer.status_code in accept:
        return answer
    message = f"{answer.request.method} {answer.request.url}: HTTP {answer.status_code}, {_explanation(answer)}"
    raise httpx.HTTPStatusError(message, request=answer.request, response=answer)


def _explanation(answer: httpx.Response) -> str:
    try:
        return str(_json(answer)["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:500]


def _task_name(task: Mapping[str, Any]) -> str:
    return f"{task['task_id']}[{task['map_index']}]" if task["map_index"] >= 0 else str(task["task_id"])


def _duration(task: Mapping[str, Any]) -> str:
    # One that waits for another try has a duration too, which counts while Airflow was stopped.
    return f" after {task['duration']:.1f} s" if task["state"] in _OVER and task["duration"] is not None else ""


def _log_line(line: str | Mapping[str, Any]) -> str:
    """One structured entry as text; the traceback of an error is an entry's `error_detail`."""
    if isinstance(line, str):
        return line
    text = str(line.get("event", ""))
    for detail in line.get("error_detail") or []:
        text += f"\n{detail.get('exc_type')}: {detail.get('exc_value')}"
        for frame in (detail.get("frames") or [])[-3:]:
            text += f"\n  at {frame.get('filename')}:{frame.get('lineno')} in {frame.get('name')}"
    return text
