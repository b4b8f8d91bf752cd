"""Figures of the board, read from folders that look like the kernel's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from spent import spending

from device_agents.host import board_power_w, read_host


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_this_process_is_told_as_another_tool_tells_it() -> None:
    facts, process = read_host(), psutil.Process()
    assert facts["rss_mb"] == pytest.approx(process.memory_info().rss / 2**20, rel=0.05)
    assert facts["threads"] == process.num_threads()
    assert facts["fds"] == process.num_fds()


def test_nothing_there_gives_nothing_and_no_error(tmp_path: Path) -> None:
    assert read_host(tmp_path) == {}


def test_the_hottest_zone_that_makes_sense(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/thermal"
    for number, text in enumerate(("48500\n", "61250\n", "-256000\n", "not a number", "", "999000")):
        put(zones / f"thermal_zone{number}", temp=text)
    (zones / "thermal_zone9").mkdir()  # a zone that sleeps has no readable temperature
    assert read_host(tmp_path)["temperature_c"] == 61.25


def test_power_is_that_of_the_rail_that_feeds_the_board(tmp_path: Path) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    put(chip, name="ina3221\n", in1_label="VDD_IN\n", in1_input="5000", curr1_input="1480")
    put(
        chip,
        in2_label="VDD_CPU_GPU_CV",
        in2_input="5000",
        curr2_input="600",
        in7_label="sum of shunt voltages",
        in7_input="3",
    )
    assert read_host(tmp_path)["power_w"] == pytest.approx(7.4)


def test_power_is_the_sum_where_no_rail_feeds_all_and_other_chips_count_for_nothing(tmp_path: Path) -> None:
    hwmon = tmp_path / "sys/class/hwmon"
    put(hwmon / "hwmon0", name="ina3221", in1_label="VDD_GPU_SOC", in1_input="20000", curr1_input="300")
    put(hwmon / "hwmon0", in2_label="VDD_CPU_CV", in2_input="20000", curr2_input="100")
    put(hwmon / "hwmon1", name="nvme", in1_input="3300", curr1_input="9999", power1_input="5000000")
    put(hwmon / "hwmon2", name="ina219", power1_input="1500000")
    assert read_host(tmp_path)["power_w"] == pytest.approx(6.0 + 2.0 + 1.5)


def test_no_rails_is_not_no_power() -> None:
    assert board_power_w({}) is None


@pytest.mark.parametrize("text", ["", "VmRSS:\nThreads: many\n", "\0\0\0", "VmRSS:\tx kB"])
def test_a_strange_proc_is_survived(tmp_path: Path, text: str) -> None:
    put(tmp_path, proc__self__status=text)
    assert read_host(tmp_path) == {}


def test_it_is_cheap() -> None:
    read_host()
    with spending() as spent:
        for _ in range(20):
            read_host()
    assert spent.cpu_s / 20 < 0.02
