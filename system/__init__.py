"""The package's use of the operating system: threads, signals, locks, output folders, and reports.

``threads`` chooses how many processor threads compute, ``interruption`` turns a signal into a stop that can be saved,
``folder_lock`` lets one process at a time write a folder, ``output_folder`` writes a folder whole or not at all,
``report`` writes the report and the figures in it, and ``platforms`` holds what operating systems do differently.
"""
