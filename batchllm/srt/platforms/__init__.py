"""What a process computes on, and how SGLang is imported there. (Upstream: ``srt/platforms``.)"""
