"""Every message in English, one topic a file."""

from gradprobe.messages.en import report, summary, verdict

MESSAGES: dict[str, str] = {**verdict.MESSAGES, **report.MESSAGES, **summary.MESSAGES}
