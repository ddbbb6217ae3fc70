"""MCP results as JSON, beside what Gradio makes of them, which is Python's own way to write them.

Gradio's own way, `gr.mcp.tool(structured_output=True)`, puts that same Python text into the structured content. So this
reaches into its server, and where a version of Gradio has another inside the tools answer as Gradio lets them.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradio.mcp import GradioMCPServer

logger = logging.getLogger(__name__)


def speak_json(server: GradioMCPServer) -> None:
    """Has a server's tools answer in JSON with structured content, and name defaults of 0 and false in their schemas.

    Structured content is an object; a tool that returns something else has it under "result". A server that is not
    built as expected stays as it is, and the log says so.
    """
    try:
        content_of, schema_of = server.postprocess_output_data, server.get_input_schema
        types = server.types
        handlers = server.mcp_server.request_handlers
        call = handlers[types.CallToolRequest]
    except (AttributeError, KeyError, TypeError) as error:
        logger.warning("MCP tools answer in Gradio's own words: its server has no %s.", error)
        return

    def as_json(data: Any, root_url: str) -> list[Any]:
        if all(isinstance(output, dict | list) and not _is_file(output) for output in data):
            return [types.TextContent(type="text", text=json.dumps(output, ensure_ascii=False)) for output in data]
        return content_of(data, root_url)

    def with_defaults(tool: str, parameters: dict[str, str] | None = None) -> tuple[dict[str, Any], list[Any]]:
        schema, files = schema_of(tool, parameters)
        try:
            endpoint = server.api_info["named_endpoints"][server.tool_to_endpoint[tool]]
            for parameter in endpoint["parameters"]:
                if parameter.get("parameter_has_default"):
                    schema["properties"][parameter["parameter_name"]]["default"] = parameter["parameter_default"]
        except (AttributeError, KeyError, TypeError) as error:
            logger.warning("defaults of %s are not in its schema: %s", tool, error)
        return schema, files

    server.postprocess_output_data, server.get_input_schema = as_json, with_defaults

    async def structured(request: Any) -> Any:
        answer = await call(request)
        texts = [each.text for each in answer.root.content if isinstance(each, types.TextContent)]
        if len(texts) == 1 and not answer.root.isError:
            try:
                value = json.loads(texts[0])
            except ValueError:
                return answer
            answer.root.structuredContent = value if isinstance(value, dict) else {"result": value}
        return answer

    handlers[types.CallToolRequest] = structured


def _is_file(output: Any) -> bool:
    return isinstance(output, dict) and "meta" in output and "path" in output
