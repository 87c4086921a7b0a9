"""H.264 with a packet for each field of a picture, as from broadcasts. FFmpeg's encoders cannot write it; these pictures are not compressed."""

import numpy as np


class Bits:
    def __init__(self):
        self.bits = ""

    def u(self, count, value):
        self.bits += f"{value:0{count}b}"
        return self

    def ue(self, *values):
        for value in values:
            code = f"{value + 1:b}"
            self.bits += "0" * (len(code) - 1) + code
        return self

    def align(self):
        self.bits += "0" * (-len(self.bits) % 8)
        return self

    def unit(self, head):
        """A unit of a stream with start code, trailing bits, and a 3 after each two zeros."""
        self.u(1, 1).align()
        out = bytearray()
        for at in range(0, len(self.bits), 8):
            byte = int(self.bits[at : at + 8], 2)
            if out[-2:] == b"\0\0" and byte <= 3:
                out.append(3)
            out.append(byte)
        return b"\0\0\0\1" + bytes([head]) + bytes(out)


def parameters(width, height):
    sequence = Bits().u(8, 77).u(8, 0).u(8, 30)  # main profile
    sequence.ue(0, 0, 2, 1).u(1, 0).ue(width // 16 - 1, height // 32 - 1)
    sequence.u(1, 0).u(1, 0).u(1, 1).u(1, 0).u(1, 0)  # not only frames, no macroblocks of both fields
    picture = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(3, 0)
    return sequence.unit(0x67) + picture.unit(0x68)


def field(luma, number, is_bottom):
    is_first = number == 0 and not is_bottom
    bits = Bits().ue(0, 7, 0).u(4, number % 16).u(1, 1).u(1, is_bottom)
    bits = bits.ue(0).u(2, 0) if is_first else bits.u(1, 0)
    bits.ue(0)
    for y in range(0, luma.shape[0], 16):
        for x in range(0, luma.shape[1], 16):
            bits.ue(25).align()  # samples as they are
            for sample in [*luma[y : y + 16, x : x + 16].flat, *[128] * 128]:
                bits.u(8, sample)
    return bits.unit(0x65 if is_first else 0x61)


def packets(images):
    """The two packets of each image (H, W), uint8; height and width are multiples of 32 and 16."""
    out = [field(np.ascontiguousarray(luma[is_bottom::2]), i, is_bottom) for i, luma in enumerate(images) for is_bottom in (0, 1)]
    return [parameters(images[0].shape[1], images[0].shape[0]) + out[0], *out[1:]]
