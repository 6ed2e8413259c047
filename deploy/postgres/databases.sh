#!/usr/bin/env bash
# Two databases, each with a role that owns it and nothing else: Optuna and MLflow both keep a table
# alembic_version, so they must never share one. The postgres image runs this once, on an empty
# volume. Passwords arrive as psql variables from the environment, not on a command line.
set -euo pipefail

psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 \
  --username "${POSTGRES_USER:-postgres}" --dbname "${POSTGRES_DB:-postgres}" <<'SQL'
\getenv sweeper SWEEPER_DB_PASSWORD
\getenv mlflow MLFLOW_DB_PASSWORD
CREATE ROLE sweeper LOGIN PASSWORD :'sweeper';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE DATABASE sweeper OWNER sweeper;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE sweeper, mlflow FROM PUBLIC;
SQL
