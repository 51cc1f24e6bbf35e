"""Jobs: what is done is not run again, a failure names its log and ends the others."""

from __future__ import annotations

import pytest

from study.jobs import Job, StudyError, run_jobs


@pytest.fixture
def said() -> list[str]:
    return []


def job(tmp_path, name: str, arguments: tuple[str, ...] = ("--version",)) -> Job:
    """A job whose result is its own log, which is there as soon as it starts."""
    return Job(name=name, arguments=arguments, result=tmp_path / "logs" / f"{name}.log")


def test_jobs_run_and_leave_their_logs(tmp_path, said):
    run_jobs([job(tmp_path, "a"), job(tmp_path, "b")], tmp_path / "logs", at_once=2, say=said.append)
    assert sorted(said) == ["a", "b"]
    assert "moshi-ttt" in (tmp_path / "logs" / "a.log").read_text()


def test_a_job_may_run_another_program(tmp_path, said):
    result = tmp_path / "written"
    program = ("-c", f"import pathlib, sys; pathlib.Path({str(result)!r}).write_text(sys.argv[1])")
    run_jobs([Job(name="a", arguments=("text",), result=result, program=program)], tmp_path, at_once=1, say=said.append)
    assert result.read_text() == "text"


def test_a_job_that_is_done_is_not_run(tmp_path, said):
    done = Job(name="done", arguments=("no-such-command",), result=tmp_path)
    run_jobs([done], tmp_path / "logs", at_once=1, say=said.append)
    assert said == []


def test_a_failure_shows_the_end_of_its_log(tmp_path, said):
    bad = job(tmp_path, "bad", ("no-such-command",))
    with pytest.raises(StudyError, match=r"bad failed \(exit status 2\)(.|\n)*No such command"):
        run_jobs([bad], tmp_path / "logs", at_once=1, say=said.append)


def test_a_command_that_ends_well_without_its_result_raises(tmp_path, said):
    lost = Job(name="lost", arguments=("--version",), result=tmp_path / "nowhere")
    with pytest.raises(StudyError, match=r"lost failed \(exit status 0\)"):
        run_jobs([lost], tmp_path / "logs", at_once=1, say=said.append)


def test_after_a_failure_nothing_else_is_started(tmp_path, said):
    jobs = [job(tmp_path, "bad", ("no-such-command",)), job(tmp_path, "later"), job(tmp_path, "last")]
    with pytest.raises(StudyError):
        run_jobs(jobs, tmp_path / "logs", at_once=1, say=said.append)
    assert "last" not in said
