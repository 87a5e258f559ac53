"""This paper: its questions, runs, studies, report and runner."""
