"""How far is TensorFlow's JPEG decoder from Pillow's? Grey levels of 255, mean and largest.

Needs TensorFlow, in an environment of its own; writes results/preprocess/jpeg.json:

    uv venv -p 3.11 tfenv && uv pip install --python tfenv/bin/python tensorflow-cpu pillow pyarrow
    tfenv/bin/python studies/jpeg_decoders.py ../shared/data/tiny_imagenet/val.parquet
"""
import io, json, os, sys
from pathlib import Path
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
import numpy as np
import PIL
import pyarrow.parquet as pq
import tensorflow as tf
from PIL import Image

images = 300
column = pq.read_table(sys.argv[1], columns=['image']).slice(0, images).column('image')
files = [r['bytes'] for r in column.to_pylist()]
assert all(f[:2] == b'\xff\xd8' for f in files), 'these are not JPEG files'
out = {}
for name,method in (('default', ''), ('INTEGER_ACCURATE', 'INTEGER_ACCURATE')):
    theirs = (tf.io.decode_jpeg(f, channels=3, dct_method=method).numpy().astype(int) for f in files)
    apart = [abs(x - np.asarray(Image.open(io.BytesIO(f)).convert('RGB'))) for x,f in zip(theirs, files)]
    out[name] = dict(mean=float(np.mean([d.mean() for d in apart])), max=int(max(d.max() for d in apart)),
                     identical=sum(not d.any() for d in apart))
folder = Path(__file__).parent.parent/'results'/'preprocess'
folder.mkdir(parents=True, exist_ok=True)
result = dict(data=Path(sys.argv[1]).parent.name, pictures=images, tensorflow=tf.__version__,
              pillow=PIL.__version__, difference_to_pillow=out)
(folder/'jpeg.json').write_text(json.dumps(result, indent=2) + '\n')
