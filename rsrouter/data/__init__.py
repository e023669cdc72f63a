"""Images and labels from files, folders, arrays and Hub data sets, one index at a time.

`load_data` takes an `.npz` file, parquet in the Hub's schema, a folder of images by class, or
`hf-hub:org/name@revision`. What it returns decodes an image when it is asked for, so ImageNet is never held in memory.
Pixels are float32 in [0,1]; an 8-bit pixel k is exactly the float nearest to k/255.
"""

from rsrouter.data.images import ImageData, from_arrays, to_unit
from rsrouter.data.load import load_data
from rsrouter.data.preprocess import resize_centre

__all__ = ["ImageData", "from_arrays", "load_data", "resize_centre", "to_unit"]
