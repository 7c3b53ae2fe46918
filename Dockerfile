# The server in a container: docs/serving.md
FROM python:3.12-slim
COPY pyproject.toml LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[serve,structured]" && rm -r /src && useradd --create-home server
USER server
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
# The container's network decides who reaches it: 0.0.0.0 is this container only.
ENTRYPOINT ["ov-phi3", "serve", "/model", "--host", "0.0.0.0"]
