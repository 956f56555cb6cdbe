"""Every message in English, one topic a file."""

from gradprobe.messages.en import advice, report, summary, verdict

MESSAGES: dict[str, str] = {**verdict.MESSAGES, **advice.MESSAGES, **report.MESSAGES, **summary.MESSAGES}
