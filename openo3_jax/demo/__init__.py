"""The paper's idea on one machine: a world, both stages, a measurement, a page. `openo3 demo` runs it."""
