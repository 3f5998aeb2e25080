"""What happened in a run, as sentences."""

from typing import Any, NamedTuple

from ssl_locat.runs.history import Run, findings

MOST = 200  # events on a page: the last ones


class Happening(NamedTuple):
    """time: UTC, to the second. routine: comes again and again, and is folded away at first. grave: it ended the run, or may spoil it."""

    time: str
    sentence: str
    routine: bool = False
    grave: bool = False


def happenings(run: Run) -> list[Happening]:
    """The last events in their order; saves that follow each other are one, and what the summary says is not said again."""
    found: list[Happening] = []
    # a warning that stands in the summary, with its advice, is only pointed to from here
    told = {fact for fact, _ in findings(run)}
    saves: list[dict[str, Any]] = []
    # the added one closes a row of saves that nothing follows
    for event in [*run.events, {"kind": "end"}]:
        if event["kind"] == "save":
            saves.append(event)
            continue
        if saves:
            found.append(Happening(_time(saves[-1]), _saved([save.get("step", "?") for save in saves]), routine=True))
            saves = []
        if event["kind"] != "end":
            grave = event["kind"] in ("diverged", "fault", "outage", "warning")
            if grave and event.get("message") in told:
                event = {**event, "message": "see the summary.", "advice": ""}
            found.append(Happening(_time(event), sentence(event), event["kind"] in ("probe", "best"), grave))
    return found[-MOST:]


def sentence(event: dict[str, Any]) -> str:
    """One event. Of a kind that this version does not know, its fields as they stand."""
    kind, step = event["kind"], event.get("step", "?")
    at = f" at step {step:,}" if isinstance(step, int) else ""
    if kind in ("start", "resume"):
        processes = event.get("world_size", 1)
        on = f" on {processes} processes" if processes != 1 else ""
        goal = f", to step {event['total_steps']:,}" if isinstance(event.get("total_steps"), int) else ""
        begin = f"Resumed{at}" if kind == "resume" else "Started" if step in (0, "?") else f"Started{at}"
        return f"{begin}{on}{goal}."
    if kind in ("branch", "change"):
        changes = "; ".join(map(str, event.get("changes") or [])) or "with the same settings"
        return (
            f"Branched from {event['parent']}: {changes}."
            if "parent" in event
            else f"Settings were changed on purpose: {changes}."
        )
    if kind == "stage":
        local = f" and {event.get('num_local')} of {event.get('local_size')}" if event.get("num_local") else ""
        return f"Stage {event.get('number', '?')} of crops began{at}: 2 of {event.get('global_size', '?')}{local} pixels, {event.get('batch', '?')} images a step."
    if kind == "probe":
        seconds = f" in {event['seconds']:g} s" if isinstance(event.get("seconds"), int | float) else ""
        return f"Probed {event.get('name', 'the teacher')}{at}{seconds}."
    if kind == "best":
        return f"The checkpoint{at} is kept: the best so far by {event.get('measure', event.get('choice', '?'))}."
    if kind == "stop":
        return f"Ended by stop_when{at}: {event.get('message', '')}."
    if kind == "warning":
        return f"Warning{at}: {event.get('message', '')} {_advice(event)}".strip()
    if kind == "preempt":
        return f"Stopped by {event.get('signal', 'a signal')}{at}, after saving."
    if kind == "requeue":
        return f"Asked Slurm to run it again{at}."
    if kind == "finish":
        return f"Finished{at}."
    if kind in ("diverged", "outage", "fault"):
        begin = {"diverged": "Diverged", "outage": "The data store did not answer", "fault": "Failed"}[kind]
        return f"{begin}{at}: {event.get('message', '')} {_advice(event)}".strip()
    # a later version may write kinds that this one has no sentence for: shown, not dropped
    rest = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "kind", "step"))
    return f"{kind}{at}{f': {rest}' if rest else ''}."


def _saved(steps: list[Any]) -> str:
    first, last = (f"{step:,}" if isinstance(step, int) else step for step in (steps[0], steps[-1]))
    return f"Saved at step {first}." if len(steps) == 1 else f"Saved {len(steps)} times, from step {first} to {last}."


def _advice(event: dict[str, Any]) -> str:
    return f"What people change: {event['advice']}" if event.get("advice") else ""


def _time(event: dict[str, Any]) -> str:
    return str(event.get("time", ""))[:19].replace("T", " ")
