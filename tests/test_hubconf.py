import subprocess
import sys
from pathlib import Path

import tpn

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys, torch
sys.path = [p for p in sys.path if p]                   # not the current folder
try:
    import tpn
except ImportError:
    pass
else:
    sys.exit("tpn is installed here; the test must run without it")
repo = sys.argv[1]
model = torch.hub.load(repo, "tsm_r50_sthv1", source="local", num_classes=7)
print(model(torch.zeros(1, 3, 4, 32, 32)).shape)
sys.path.insert(0, repo)
import hubconf
print(hubconf.tpn_slowonly_r101_k400.__doc__)
print(*hubconf.__all__)
"""


def test_torch_hub_from_a_folder_where_tpn_is_not_installed(tmp_path):
    """A copy of the checkout, and an interpreter that does not see any installed tpn."""
    blocked = f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    finder = (
        "class NoEditable:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tpn' and sys.argv[1] not in sys.path: raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoEditable())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + finder + SCRIPT, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    shape, doc, names = done.stdout.splitlines()
    assert set(names.split()) == {*tpn.list_models(), "tpn"}
    assert shape == "torch.Size([1, 7])"
    assert doc.startswith("TPN on SlowOnly ResNet-101")
