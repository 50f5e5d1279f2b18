"""What a run leaves behind and shows: storage, run folder, progress, records."""

from genray.recording.progress import Progress
from genray.recording.recorder import RunRecorder
from genray.recording.run_folder import RunFolder
from genray.storage import Storage

__all__ = ["Progress", "RunFolder", "RunRecorder", "Storage"]
