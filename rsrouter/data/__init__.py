"""Images and labels from files, folders, arrays and Hub data sets, one index at a time.

`load_data` takes files, folders, Hub data sets and objects in memory, and decodes an image when it is asked for, so ImageNet
is never held in memory. Pixels are float32 in [0,1]; an 8-bit pixel k is exactly the float nearest to k/255. `inspect_data`
tells what was understood.
"""

from rsrouter.data.arrays import from_arrays
from rsrouter.data.images import ImageData, to_unit
from rsrouter.data.inspection import Inspection, contact_sheet, inspect_data
from rsrouter.data.load import load_data
from rsrouter.data.pictures import FORMATS, UnreadableError, decode
from rsrouter.data.preprocess import resize_centre

__all__ = [
    "FORMATS",
    "ImageData",
    "Inspection",
    "UnreadableError",
    "contact_sheet",
    "decode",
    "from_arrays",
    "inspect_data",
    "load_data",
    "resize_centre",
    "to_unit",
]
