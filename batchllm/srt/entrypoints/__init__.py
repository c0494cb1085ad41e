"""What starts processes, and what each begins with. (Upstream: ``srt/entrypoints``.)"""
