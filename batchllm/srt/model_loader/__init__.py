"""Models as files: what a folder lacks, what is imported, which weights are there. (Upstream: ``srt/model_loader``.)"""
