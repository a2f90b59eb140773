"""How far are the official resizes from ours on photographs? Grey levels of 255, mean and largest.

    python studies/resize_photos.py ../shared/data/flickr8k_128 64       # results/preprocess/flickr8k_128-64.json
    python studies/resize_photos.py ../shared/data/tiny_imagenet 224
"""
import platform
from importlib.metadata import version
from pathlib import Path
import torch
from fastcore.script import call_parse
from torchvision.transforms import v2
from tqdm import tqdm
from flip_nb.data.decode import decode_image, eval_transform
from flip_nb.data.folders import load_rows, pair_columns
from flip_nb.official.preprocess import centre_crop, official_resize
from flip_nb.files import write_json

RESULTS = Path(__file__).parent.parent/'results'/'preprocess'

@call_parse
def main(
    data:str, # Folder of pairs with a test or val split
    side:int, # Side of the result in pixels
    pictures:int=300, # How many, from the first
):
    "Measure and store."
    rows = load_rows(data)
    rows = rows.get('test', rows.get('val')).select(range(pictures))
    column,_,_ = pair_columns(rows.features)
    ours,differences = eval_transform(side),dict(training=[], evaluation=[])
    for row in tqdm(rows):
        square = centre_crop(decode_image(row[column]))
        x = v2.PILToTensor()(square)
        for name,half_pixel in (('training', True), ('evaluation', False)):
            differences[name].append((official_resize(x, side, half_pixel) - ours(square)).abs())
    mean = lambda d: torch.stack([a.mean() for a in d]).mean().item()
    out = {k: dict(mean=mean(d), max=max(a.max() for a in d).item()) for k,d in differences.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = dict(python=platform.python_version(), **{p: version(p) for p in ('torch', 'torchvision', 'pillow')})
    name = Path(data).name
    write_json(RESULTS/f'{name}-{side}.json',
               dict(data=name, side=side, pictures=pictures, **versions, difference_to_ours=out))
