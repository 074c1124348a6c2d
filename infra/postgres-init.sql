-- The first database, airflow, is made by the image itself.
CREATE DATABASE mlflow;
