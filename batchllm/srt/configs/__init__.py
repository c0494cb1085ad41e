"""Models as configurations: which are refused, and why. (Upstream: ``srt/configs``.)"""
