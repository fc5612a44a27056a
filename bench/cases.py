"""Where the attention block really runs: the blocks of SeaFormer and YOLOv8, and their maps."""

from dataclasses import dataclass

ATTN_RATIO = 2
ACTIVATION = "relu6"

SEAFORMER_INPUTS = {
    "224": (224, 224),
    "512": (512, 512),
    "512x1024": (512, 1024),
    "1024": (1024, 1024),
    "1024x2048": (1024, 2048),
}
YOLO_INPUTS = {"640": (640, 640)}

#: Sides of the square maps on which scaling is shown, and those beyond the table of cases.
SWEEP_SIDES = (8, 16, 32, 64, 128)
LARGE_SIDES = (256, 512)


@dataclass(frozen=True)
class Case:
    """One attention block: ``channels`` C, ``key_dim`` D, and the ``stride`` of its map."""

    name: str
    channels: int
    key_dim: int
    heads: int
    stride: int
    blocks: int = 1
    yolo: bool = False

    @property
    def values(self) -> int:
        """DH"""
        return self.heads * ATTN_RATIO * self.key_dim

    @property
    def projected(self) -> int:
        """NQ"""
        return 2 * self.heads * self.key_dim + self.values

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """``(H, W)`` of the block's map by the size of the image; strided layers round up."""
        inputs = YOLO_INPUTS if self.yolo else SEAFORMER_INPUTS
        return {
            name: (-(-height // self.stride), -(-width // self.stride))
            for name, (height, width) in inputs.items()
        }

    def flops(self, height: int, width: int, batch: int = 1) -> int:
        """Two for a multiply-add of the convolutions, the products of an axis and the attention."""
        c, projected, values = self.channels, self.projected, self.values
        pixel = c * projected + 9 * projected + projected * c + values * c
        axis = projected * c + values * values
        attention = (self.heads * self.key_dim + values) * (height**2 + width**2)
        return 2 * batch * (height * width * pixel + (height + width) * axis + attention)

    def fewest_bytes(self, height: int, width: int, batch: int, itemsize: int) -> int:
        """x read once, the result written once."""
        return 2 * batch * self.channels * height * width * itemsize


CASES = {
    case.name: case
    for case in (
        Case("T1", 128, 16, 4, stride=32, blocks=2),
        Case("T2", 160, 24, 4, stride=64, blocks=2),
        Case("S1", 160, 16, 6, stride=32, blocks=3),
        Case("S2", 192, 24, 6, stride=64, blocks=3),
        Case("B1", 192, 16, 8, stride=32, blocks=4),
        Case("B2", 256, 24, 8, stride=64, blocks=4),
        Case("L1", 192, 16, 8, stride=16, blocks=3),
        Case("L2", 256, 20, 8, stride=32, blocks=3),
        Case("L3", 320, 24, 8, stride=64, blocks=3),
        Case("YOLOv8n-P3", 64, 16, 4, stride=8, yolo=True),
        Case("YOLOv8n-P4", 128, 16, 4, stride=16, yolo=True),
        Case("YOLOv8n-P5", 256, 16, 4, stride=32, yolo=True),
        Case("YOLOv8s-P3", 128, 16, 4, stride=8, yolo=True),
        Case("YOLOv8s-P4", 256, 16, 4, stride=16, yolo=True),
        Case("YOLOv8s-P5", 512, 16, 4, stride=32, yolo=True),
    )
}
