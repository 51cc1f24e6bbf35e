"""In place of PortAudio: a microphone that plays MICROPHONE (.npy, float32) once, and a speaker that writes SPEAKER."""

import os
import threading
import time

import numpy as np


class _Stream:
    def __init__(self, samplerate, channels, blocksize, callback):
        self.size, self.callback, self.period = blocksize, callback, blocksize / samplerate
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        self.thread.join()

    def blocks(self):
        due = time.monotonic()
        while not self.ended.is_set():
            yield
            due += self.period
            self.ended.wait(max(0.0, due - time.monotonic()))


class InputStream(_Stream):
    def run(self):
        samples = np.load(os.environ["MICROPHONE"])
        for at, _ in enumerate(self.blocks()):
            block = samples[at * self.size : (at + 1) * self.size]
            if len(block) < self.size:
                return
            self.callback(block[:, None], self.size, None, None)


class OutputStream(_Stream):
    def run(self):
        played = []
        for _ in self.blocks():
            block = np.zeros((self.size, 1), np.float32)
            self.callback(block, self.size, None, None)
            played.append(block[:, 0])
            np.save(os.environ["SPEAKER"] + ".part.npy", np.concatenate(played))
            os.replace(os.environ["SPEAKER"] + ".part.npy", os.environ["SPEAKER"])
