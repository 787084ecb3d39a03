"""Programs that save models in processes of their own, with other versions and backends of Keras."""
