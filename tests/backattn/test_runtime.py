"""What is said to people while something runs."""

from backattn import runtime


def test_a_line_for_people_stays_out_of_executed_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(runtime.PROGRESS_FILE, raising=False)
    runtime.say("waiting")
    assert capsys.readouterr().err == "waiting\n"
    monkeypatch.setenv(runtime.PROGRESS_FILE, str(tmp_path / "progress"))
    runtime.say("waiting")
    assert (tmp_path / "progress").read_text() == "waiting\n" and capsys.readouterr().err == ""
